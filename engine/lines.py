"""Events as lines of text, for the terminal and log.txt, in the words that mlx-lm's trainer made familiar."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping

from engine.events import (
    Alarm,
    CheckpointSaved,
    Event,
    LoadingProgress,
    Notice,
    RunEnded,
    RunOpened,
    State,
    StateChanged,
    StepCompleted,
    Validated,
)

STEPS_A_LINE = 10
LOADING_A_LINE_SECONDS, LOADING_A_LINE_SHARE = 10.0, 0.1
"""What takes long before a run trains has a line at its beginning and its end, and when so much has passed."""


class LineWriter:
    """Turns events into lines. Steps are gathered: one line tells of the last `STEPS_A_LINE` of them."""

    def __init__(self, with_clock: bool = False) -> None:
        self._with_clock = with_clock
        self._steps: list[StepCompleted] = []
        self._loading: LoadingProgress | None = None

    def lines(self, event: Event) -> list[str]:
        """The lines that are due after this event, often none."""
        texts: list[str] = []
        if isinstance(event, StepCompleted):
            self._steps.append(event)
            if (len(self._steps) == 1 and event.step == 1) or event.step % STEPS_A_LINE == 0:
                texts.append(self._gathered())
        elif isinstance(event, LoadingProgress):
            if self._is_news(event):
                self._loading = event
                texts.append(_how_far(event))
        elif (text := describe(event)) is not None:
            if self._steps and isinstance(event, Validated | RunEnded):
                texts.append(self._gathered())
            texts.append(text)
            if isinstance(event, RunOpened):  # it may have gone back
                self._steps = [step for step in self._steps if step.step <= event.step]
        if not self._with_clock:
            return texts
        clock = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event.time))
        return [f"{clock}  {text}" for text in texts]

    def _is_news(self, event: LoadingProgress) -> bool:
        last = self._loading
        if last is None or last.what != event.what:
            return True
        if event.time - last.time >= LOADING_A_LINE_SECONDS:
            return True
        due = last.done + LOADING_A_LINE_SHARE * event.total if event.total else math.inf
        return last.done < event.done and event.done >= min(due, event.total or math.inf)

    def _gathered(self) -> str:
        steps, self._steps = self._steps, []
        newest = steps[-1].metrics
        seconds = sum(1 / step.metrics["steps_per_second"] for step in steps)
        tokens = sum(step.metrics["tokens_per_second"] / step.metrics["steps_per_second"] for step in steps)
        return (
            f"Iter {steps[-1].step}: Train loss {_mean(steps, 'loss'):.3f}, "
            f"Learning Rate {newest['learning_rate']:.3e}, It/sec {len(steps) / seconds:.3f}, "
            f"Tokens/sec {tokens / seconds:.1f}, Trained Tokens {newest['trained_tokens']:.0f}, "
            f"Peak mem {newest['peak_memory_bytes'] / 1e9:.3f} GB, Grad norm {_mean(steps, 'grad_norm'):.3f}"
        )


def describe(event: Event) -> str | None:
    """One event in words, or None for those that are no line of their own (steps, chat)."""
    match event:
        case RunOpened():
            start = f"continues at step {event.step}" if event.step else "starts"
            return (
                f"{event.run}: {event.task}, {_parameters(event)}, {event.dtype} on {event.device}; "
                f"{start}, {event.total_steps} steps in all; {event.directory}"
            )
        case StateChanged(state=State.TRAINING | State.VALIDATING | State.LOADING, reason=""):
            return None
        case StateChanged():
            return f"{event.state}{f': {event.reason}' if event.reason else ''}"
        case Validated():
            return f"Iter {event.step}: {_named(event.metrics)}{', the best so far' if event.best else ''}"
        case CheckpointSaved():
            return f"Iter {event.step}: checkpoint saved to {event.path} ({event.size_bytes / 1e6:.1f} MB)"
        case Alarm():
            return f"{event.level}: {event.text}"
        case Notice():
            return event.text
        case RunEnded():
            return f"{event.state} at step {event.step}: {event.reason}"
        case _:
            return None


def _parameters(event: RunOpened) -> str:
    """`1,234 parameters`, or `56 of 1,234 parameters trained`."""
    trained, said = event.trained_parameters, f"{event.parameters:,} parameters"
    return said if trained in (None, event.parameters) else f"{trained:,} of {said} trained"


_WORDS = {"val_loss": "Val loss", "val_perplexity": "Val perplexity", "val_bits_per_byte": "Val bits per byte"}


def _named(metrics: Mapping[str, float]) -> str:
    return ", ".join(f"{_WORDS.get(name, name)} {value:.3f}" for name, value in metrics.items())


def _how_far(event: LoadingProgress) -> str:
    """`downloading …: 1.21 of 3.09 GB (39 %)`."""
    unit, scale, decimals = event.unit, 1.0, 0
    if unit == "bytes":
        large = (event.total or event.done) >= 1e8
        unit, scale, decimals = ("GB", 1e9, 2) if large else ("MB", 1e6, 0)
    done = f"{event.done / scale:,.{decimals}f}"
    if not event.total:
        return f"{event.what}: {done} {unit}" if unit else event.what
    percent = round(100 * event.done / event.total)
    return f"{event.what}: {done} of {event.total / scale:,.{decimals}f} {unit} ({percent} %)"


def _mean(steps: list[StepCompleted], metric: str) -> float:
    return math.fsum(step.metrics[metric] for step in steps) / len(steps)
