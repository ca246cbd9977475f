"""What an open chat costs: training speed while an answer streams, against the steps before and after it.

    python tests/benchmarks/chat_speed.py [--steps 10] [--rounds 6]

One run of the demo; stretches of steps without and with an open chat follow each other. The longest wait between two
pieces of text is held against the longest micro-batch.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from statistics import median

from engine.commands import CancelGeneration, Generate, Stop
from engine.events import AnswerEnded, AnswerText, Event, StepCompleted
from retention_tui.session import LocalClient, Session


def stream(client: LocalClient) -> Iterator[Event]:
    while client.alive:
        yield from client.events(timeout_seconds=0.5)


def stretch(events: Iterator[Event], steps: int) -> tuple[float, list[float], bool]:
    """Seconds a step over the next steps, when pieces of text came, and whether an answer ended."""
    times: list[float] = []
    pieces: list[float] = []
    ended = False
    for event in events:
        ended = ended or isinstance(event, AnswerEnded)
        if isinstance(event, AnswerText):
            pieces.append(event.time)
        if isinstance(event, StepCompleted):
            times.append(event.time)
            if len(times) > steps:
                break
    return (times[-1] - times[0]) / steps, pieces, ended


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10, help="steps of a stretch")
    parser.add_argument("--rounds", type=int, default=6)
    options = parser.parse_args()
    ratios, rates, waits = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        session = Session(Path(folder))
        asides = ["validate.every=0", "checkpoint.every=0", "checkpoint.every_minutes=0"]
        client = session.start("demo", ["train.steps=1000000", "train.warmup_steps=1000000", *asides])
        events = stream(client)
        stretch(events, 3)
        asked = 0
        while len(ratios) < options.rounds:
            alone, _, _ = stretch(events, options.steps)
            asked += 1
            # So hot that the text seldom ends by itself; where it does, the round does not count.
            client.send(Generate(str(asked), "The", max_tokens=1_000_000, temperature=5.0, top_p=1.0, seed=asked))
            first = next(event for event in events if isinstance(event, AnswerText | AnswerEnded))
            beside, pieces, ended = stretch(events, options.steps)
            if ended or isinstance(first, AnswerEnded):
                continue
            client.send(CancelGeneration(str(asked)))
            next(event for event in events if isinstance(event, AnswerEnded))
            ratios.append(alone / beside)
            rates.append((len(pieces) - 1) / (pieces[-1] - pieces[0]))
            waits.append(max(later - sooner for sooner, later in pairwise(pieces)) / alone)
        client.send(Stop(checkpoint=False))
        session.finish()
    print(f"training beside a chat: {median(ratios):.2f} of its speed alone  (at least 0.5)")
    print(f"the chat: {median(rates):.0f} pieces of text a second")
    print(f"longest wait for a piece: {max(waits):.2f} micro-batches, the update included")


if __name__ == "__main__":
    main()
