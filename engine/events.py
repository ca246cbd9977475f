"""What a running engine says.

Events are frozen values. Each becomes one JSON object (`to_json`), which is also what `run --json` prints,
so a script sees exactly what a screen sees.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, ClassVar


class State(StrEnum):
    """What a run is doing. The last three are final."""

    LOADING = "loading"
    TRAINING = "training"
    VALIDATING = "validating"
    PAUSED = "paused"
    STOPPING = "stopping"
    FINISHED = "finished"
    STOPPED = "stopped"
    FAILED = "failed"

    @property
    def final(self) -> bool:
        return self in (State.FINISHED, State.STOPPED, State.FAILED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Base of all events; `time` is in seconds since the epoch."""

    kind: ClassVar[str] = "event"
    time: float = field(default_factory=time.time)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOpened(Event):
    """Model and data are loaded; training starts at `step` (0 for a new run) of `total_steps`."""

    kind: ClassVar[str] = "run_opened"
    run: str
    directory: str
    task: str
    device: str
    dtype: str
    parameters: int
    step: int
    total_steps: int
    attempt: int
    trained_parameters: int | None = None
    """Those of `parameters` that are trained; None where an older release did not say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StateChanged(Event):
    """The run is now in `state`; `reason` is in words and may be empty."""

    kind: ClassVar[str] = "state"
    state: State
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadingProgress(Event):
    """How far something is that a run needs before it can train: a download, a base that is pretrained here."""

    kind: ClassVar[str] = "loading"
    what: str
    done: float
    total: float | None
    unit: str = ""
    """`bytes`, `steps` or `rows`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCompleted(Event):
    """One optimizer update. `metrics` are named as in the store (`loss`, `grad_norm`, `learning_rate`, …)."""

    kind: ClassVar[str] = "step"
    step: int
    total_steps: int
    metrics: Mapping[str, float]
    elapsed_seconds: float
    remaining_seconds: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryHeld(Event):
    """What the arrays that a run keeps take, counted at its first step: by the names of a plan's components."""

    kind: ClassVar[str] = "memory"
    step: int
    held_bytes: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Validated(Event):
    """Held-out metrics after `step`: `val_loss`, `val_perplexity`, `val_bits_per_byte`, …"""

    kind: ClassVar[str] = "validation"
    step: int
    metrics: Mapping[str, float]
    best: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointSaved(Event):
    kind: ClassVar[str] = "checkpoint"
    step: int
    path: str
    size_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Alarm(Event):
    """Something the owner should know; `level` is `warning` or `critical`, `guard` the one that raised it."""

    kind: ClassVar[str] = "alarm"
    level: str
    text: str
    guard: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice(Event):
    """A line for the log."""

    kind: ClassVar[str] = "notice"
    text: str


class Level(StrEnum):
    """How hard memory is to get on this machine, as macOS's Activity Monitor colours it."""

    GREEN = "green"
    YELLOW = "yellow"
    RED = "red"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading(Event):
    """What one look at the machine found, once a second. None is unknown, never zero."""

    kind: ClassVar[str] = "host"
    level: Level | None = None
    """The worst that any sign of memory pressure says."""
    cause: str = ""
    """In words, which sign that was, where it is not green: `cgroup at 96 % of 1.0 GB`."""
    limit_bytes: int | None = None
    """What this process may use at most: the machine's memory, or less in a control group."""
    available_bytes: int | None = None
    """What can still be had below that limit without swapping."""
    swap_bytes: int | None = None
    stalled_percent: float | None = None
    """Time in which some task waited for memory, of the last ten seconds (Linux: PSI, `some avg10`)."""
    gpu_bytes: int | None = None
    gpu_limit_bytes: int | None = None
    process_bytes: int | None = None
    heat: str | None = None
    """`nominal`, `fair`, `serious` or `critical`, as macOS names it."""
    on_mains: bool | None = None
    battery_percent: float | None = None
    lid_closed: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerStarted(Event):
    """An answer began with the weights of `step` and keeps them to its end."""

    kind: ClassVar[str] = "answer_started"
    answer: str
    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerText(Event):
    """The next piece of text of an answer."""

    kind: ClassVar[str] = "answer_text"
    answer: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerEnded(Event):
    """`reason` is `length`, `end of text`, `cancelled`, `run ended` or, after `failed: `, what went wrong."""

    kind: ClassVar[str] = "answer_ended"
    answer: str
    reason: str
    tokens: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RunEnded(Event):
    """The last event of a run."""

    kind: ClassVar[str] = "run_ended"
    state: State
    reason: str
    exit_code: int
    step: int


def to_json(event: Event) -> str:
    """One line of JSON with a key `event` naming the kind; NaN and infinities become strings, as JSON has none."""
    fields = {field.name: plain(getattr(event, field.name)) for field in dataclasses.fields(event)}
    return json.dumps({"event": event.kind, **fields}, ensure_ascii=False, allow_nan=False)


def plain(value: Any) -> Any:
    """The value as JSON can hold it: NaN and infinities become strings."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value
