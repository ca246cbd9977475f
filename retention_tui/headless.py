"""A run without a screen: its lines, or its events as JSON, on standard output."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

from engine.events import Event, RunEnded, State, to_json
from engine.lines import LineWriter
from retention_tui.session import LocalClient


def follow(client: LocalClient, *, as_json: bool = False) -> bool:
    """Prints what the run says until it has ended; false if somebody else has heard the end already.

    In words, a failure's reason is left to the caller. Output that nobody reads any more does not end the run.
    """
    writer = LineWriter()
    listening = True
    while True:
        alive = client.alive
        events = client.events(timeout_seconds=0.5)
        for event in events:
            texts = [to_json(event)] if as_json else _lines(writer, event)
            if listening and not _print(texts):
                listening = False
                _print_elsewhere(client.run.log_path)
            if isinstance(event, RunEnded):
                return True
        if not alive and not events:
            return False


def _lines(writer: LineWriter, event: Event) -> list[str]:
    lines = writer.lines(event)
    return lines[:-1] if isinstance(event, RunEnded) and event.state is State.FAILED else lines


def _print(texts: list[str]) -> bool:
    try:
        for text in texts:
            sys.stdout.write(text + "\n")
        sys.stdout.flush()
    except (OSError, ValueError):  # a closed pipe or a lost terminal
        return False
    return True


def _print_elsewhere(log: Path) -> None:
    """What could not be printed is dropped, as the log has it; what libraries print goes there from now on."""
    numbers = [1, 2] if os.path.sameopenfile(1, 2) else [1]
    with Path(os.devnull).open("wb") as nothing:
        os.dup2(nothing.fileno(), 1)
    with suppress(OSError, ValueError):
        sys.stdout.flush()
    with suppress(OSError), log.open("ab") as file:
        for number in numbers:
            os.dup2(file.fileno(), number)
