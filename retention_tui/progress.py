"""What the events of a run add up to: all that a screen shows of it, and nothing about how."""

from __future__ import annotations

import contextlib
import math
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from engine.events import (
    Alarm,
    CheckpointSaved,
    Event,
    LoadingProgress,
    MemoryHeld,
    Notice,
    Reading,
    RunEnded,
    RunOpened,
    State,
    StateChanged,
    StepCompleted,
    Validated,
)
from engine.store import RunDirectory
from engine.wire import WireError, read_event
from retention_tui import wording
from retention_tui.client import ConnectionLost, Reconnected
from retention_tui.history import Series, Smoother
from retention_tui.loading import LoadingPace
from retention_tui.marks import MARKS_KEPT, Mark, MarkKind, gone_back

CHARTED = (
    "loss",
    "grad_norm",
    "steps_per_second",
    "active_memory_bytes",
    "peak_memory_bytes",
    "cache_memory_bytes",
    "process_memory_bytes",
    "val_loss",
)
LOG_ENTRIES = 1000
PAST_ENTRIES = 200
"""Lines of earlier attempts that the log begins with, at most: each takes the screen a moment to write."""
_USUAL = (State.LOADING, State.TRAINING, State.VALIDATING)  # they come and go all the time; the header shows them


class Weight(Enum):
    """How much an entry of the log asks of its reader."""

    PLAIN = "plain"
    GOOD = "good"
    WARNING = "warning"
    CRITICAL = "critical"


@dataclass(frozen=True, slots=True)
class Entry:
    """A line of the log; `time` in seconds since the epoch."""

    time: float
    weight: Weight
    text: str


class Trend(Enum):
    """Where the loss is going: its quick average against its slow one."""

    FALLING = "▼"
    RISING = "▲"
    LEVEL = "▸"
    UNKNOWN = " "


class Progress:
    """The state of one run, folded from its events by `apply`."""

    def __init__(self, read_until: float = -math.inf) -> None:
        self.opened: RunOpened | None = None
        self.ended: RunEnded | None = None
        self.lost = ""
        """Where nothing more will be heard of the run, though it has not said its end: the word for that."""
        self.state = State.LOADING
        self.loading: LoadingPace | None = None
        """While it cannot train yet: how far that is, once it was told."""
        self.reason = ""
        self.step = 0
        self.total_steps = 0
        self.elapsed_seconds: float | None = None
        self.remaining_seconds: float | None = None
        self.metrics: dict[str, float] = {}
        self.held_bytes: Mapping[str, float] = {}
        """What weights, gradients and optimizer take, by the names that a plan has for them; empty before a step."""
        self.reading: Reading | None = None
        """The newest look at the machine; None where it is not watched."""
        self.pads = False
        """Whether some of the tokens that were computed were padding."""
        self.marks: deque[Mark] = deque(maxlen=MARKS_KEPT)
        self.best_val_loss: float | None = None
        self.best_step: int | None = None
        self.series = empty_history()
        self.entries: deque[Entry] = deque(maxlen=LOG_ENTRIES)
        self.entries_seen = 0
        """Entries ever made, also those that the log has let go."""
        self.unread: list[Entry] = []
        """Alarms that nobody has read yet, oldest first; those up to `read_until` were read before."""
        self.began = math.inf
        """The time of the first event of this attempt, in seconds since the epoch."""
        self._waiting: list[tuple[int, Mapping[str, float]]] | None = []
        self._read_until = read_until
        self._validated_step = 0
        self._quick, self._slow = Smoother(0.9), Smoother(0.98)

    @property
    def trend(self) -> Trend:
        """The direction of the loss over the last steps; level within 0.2 %."""
        quick, slow = self._quick.value, self._slow.value
        if not quick > 0 or not slow > 0 or len(self.series["loss"]) < 3:
            return Trend.UNKNOWN
        if quick < slow * 0.998:
            return Trend.FALLING
        return Trend.RISING if quick > slow * 1.002 else Trend.LEVEL

    @property
    def over(self) -> bool:
        """True once nothing more will come."""
        return self.state.final or bool(self.lost)

    @property
    def fraction(self) -> float:
        """Done, from 0 to 1."""
        return min(1.0, self.step / self.total_steps) if self.total_steps else 0.0

    @property
    def span(self) -> tuple[float, float]:
        """The steps that all charts show: from the first one known to a round number past the newest."""
        series = self.series["loss"]
        if not len(series):
            return 0.0, float(max(self.total_steps, 1))
        start = max(0.0, series.first_step - 1)
        return start, start + _round_up(max(series.last_step - start, 10.0), self.total_steps - start)

    def read_alarms(self) -> None:
        """All alarms count as read."""
        self.unread.clear()

    def adopt_history(self, history: dict[str, Series]) -> None:
        """Takes what the store knows of the steps before this attempt; those that came meanwhile go on top."""
        self.series = history
        waiting, self._waiting = self._waiting or [], None
        for step, metrics in waiting:
            known = {name for name in metrics if name in self.series and step <= self.series[name].last_step}
            self._chart(step, {name: value for name, value in metrics.items() if name not in known})
        if self.best_step is None and (best := history["val_loss"].least()) is not None:
            self.best_step, self.best_val_loss = int(best[0]), best[1]
        if "val_loss" not in self.metrics and (newest := history["val_loss"].newest()) is not None:
            self._validated_step, self.metrics["val_loss"] = int(newest[0]), newest[1]

    def adopt_entries(self, entries: list[Entry]) -> None:
        """Puts what the log said in earlier attempts before what it has said since."""
        self.entries = deque([*entries, *self.entries], maxlen=LOG_ENTRIES)
        self.entries_seen += len(entries)

    def adopt_marks(self, marks: list[Mark]) -> None:
        """Puts what happened in earlier attempts before what has happened since."""
        self.marks = deque([*marks, *self.marks], maxlen=MARKS_KEPT)

    def expect_stop(self) -> None:
        """The run was asked to stop and will say so when it comes to it."""
        if not self.over:
            self.state = State.STOPPING

    def note(self, text: str) -> None:
        """Adds a line of the screen's own to the log."""
        self._note(time.time(), Weight.PLAIN, text)

    def apply(self, event: Event) -> None:
        """Takes the next event. Events about answers are the chat's and change nothing here."""
        self.began = min(self.began, event.time)
        match event:
            case RunOpened():
                self.opened, self.ended, self.loading = event, None, None
                self._waiting = []  # until the history is there
                self._forget_beyond(event.step)
                self.step, self.total_steps = event.step, event.total_steps
                where = f"goes on at step {event.step:,}" if event.step else f"starts on {event.device}, {event.dtype}"
                self._note(event.time, Weight.PLAIN, f"{event.run} {where}")
            case StateChanged():
                self.state, self.reason = event.state, event.reason
                self.loading = self.loading if event.state is State.LOADING else None
                if event.reason or event.state not in _USUAL:
                    said = f"{event.state}: {event.reason}" if event.reason else event.state
                    self._note(event.time, Weight.PLAIN, said)
            case StepCompleted():
                self._step(event)
            case Validated():
                self._validated(event)
            case Reading() | MemoryHeld() | LoadingProgress():
                self._glance(event)
            case CheckpointSaved():
                self.marks.append(Mark(event.step, MarkKind.CHECKPOINT))
                said = f"checkpoint of step {event.step:,} saved: {wording.size(event.size_bytes)}"
                self._note(event.time, Weight.PLAIN, f"{said} in {event.seconds:.2f} s")
            case Alarm():
                weight = Weight.CRITICAL if event.level == "critical" else Weight.WARNING
                self._expect_reader(self._note(event.time, weight, event.text))
                self.marks.append(Mark(self.step, MarkKind.of_alarm(event.level)))
            case Notice():
                self._note(event.time, Weight.PLAIN, event.text)
            case RunEnded():
                self.ended, self.state, self.reason = event, event.state, event.reason
                self.loading = None
                self.remaining_seconds = None
                weight = Weight.CRITICAL if event.state is State.FAILED else Weight.GOOD
                reason = f": {event.reason}" if event.reason else ""
                entry = self._note(event.time, weight, f"{event.state} at step {event.step:,}{reason}")
                if event.state is State.FAILED:
                    self._expect_reader(entry)
            case ConnectionLost() | Reconnected():
                self._connection_broke(event)

    def _forget_beyond(self, step: int) -> None:
        """The run is at `step`: what it had come to beyond, before it went back, is not of its line."""
        self.marks = deque(gone_back(self.marks, step), maxlen=MARKS_KEPT)
        if self._validated_step > step:
            self.metrics = {name: value for name, value in self.metrics.items() if not name.startswith("val_")}
        if self.best_step is not None and self.best_step > step:
            self.best_step = self.best_val_loss = None  # the history knows the one before

    def _connection_broke(self, event: ConnectionLost | Reconnected) -> None:
        if isinstance(event, Reconnected):
            self.state = event.state
            self._waiting = []  # as steps may have been missed, the history is loaded again
            self._note(event.time, Weight.PLAIN, "the connection broke and was made again")
        else:
            self.lost, self.reason, self.remaining_seconds = event.word, "", None
            self._expect_reader(self._note(event.time, Weight.CRITICAL, event.text))

    def _glance(self, event: Reading | MemoryHeld | LoadingProgress) -> None:
        if isinstance(event, Reading):
            self.reading = event
        elif isinstance(event, MemoryHeld):
            self.held_bytes = event.held_bytes
        else:
            self.loading = self.loading or LoadingPace()
            self.loading.take(event)

    def _step(self, event: StepCompleted) -> None:
        self.step, self.total_steps = event.step, event.total_steps
        self.elapsed_seconds, self.remaining_seconds = event.elapsed_seconds, event.remaining_seconds
        self.metrics.update(event.metrics)
        self.pads = self.pads or event.metrics.get("real_token_share", 1.0) < 1
        if (loss := event.metrics.get("loss")) is not None:
            self._quick.add(loss)
            self._slow.add(loss)
        self._chart(event.step, event.metrics)

    def _validated(self, event: Validated) -> None:
        self.metrics.update(event.metrics)
        self._validated_step = event.step
        val_loss = event.metrics.get("val_loss")
        if event.best and val_loss is not None:
            self.best_val_loss, self.best_step = val_loss, event.step
        self._chart(event.step, event.metrics)
        said = f"held-out loss {wording.number(val_loss)} at step {event.step:,}"
        bits = event.metrics.get("val_bits_per_byte")
        said += f", {wording.number(bits)} bits per byte" if bits is not None else ""
        self._note(event.time, Weight.PLAIN, said + (", the best so far" if event.best else ""))

    def _chart(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._waiting is not None:
            self._waiting.append((step, metrics))
            return
        for name, value in metrics.items():
            if name in self.series:
                self.series[name].add(step, value)

    def _expect_reader(self, entry: Entry) -> None:
        if entry.time > self._read_until:
            self.unread.append(entry)

    def _note(self, moment: float, weight: Weight, text: str) -> Entry:
        entry = Entry(moment, weight, wording.printable(" ".join(text.split())))
        self.entries.append(entry)
        self.entries_seen += 1
        return entry


def empty_history() -> dict[str, Series]:
    """A series for each metric that is charted."""
    return {name: Series() for name in CHARTED}


def load_history(run: RunDirectory) -> dict[str, Series]:
    """What the store knows of a run. Reads the disk: never on the UI thread."""
    return {name: Series.of(*run.curve(name)) for name in CHARTED}


def load_entries(run: RunDirectory, before: float) -> list[Entry]:
    """What the log said before a moment, in seconds since the epoch, oldest first. Reads the disk, as above."""
    past = Progress()
    for stored in run.events():
        with contextlib.suppress(WireError):  # of another release
            event = read_event(stored)
            if event.time < before:
                past.apply(event)
    return list(past.entries)[-PAST_ENTRIES:]


def _round_up(value: float, limit: float) -> float:
    """The next of 1, 1¼, 1½, 2, 2½, 3, 4, 5, 6, 8 times a power of ten, so that the axis moves seldom."""
    magnitude = 10.0
    while magnitude * 10 <= value:
        magnitude *= 10
    for factor in (1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10):
        if factor * magnitude >= value:
            rounded = factor * magnitude
            return max(value, min(rounded, limit)) if limit > 0 else rounded
    return value
