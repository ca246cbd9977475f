"""What a run says, to everyone who should know: subscribers, the store and log.txt."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO

from engine.errors import UserError
from engine.events import (
    Alarm,
    AnswerEnded,
    AnswerStarted,
    AnswerText,
    Event,
    LoadingProgress,
    Notice,
    Reading,
    RunEnded,
    State,
    StateChanged,
    StepCompleted,
)
from engine.lines import LineWriter
from engine.store import RunDirectory
from engine.store_writer import StoreWriter

_NOT_STORED = (StepCompleted, LoadingProgress, AnswerStarted, AnswerText, AnswerEnded)


class Journal:
    """Owned by the worker thread. Without a run (a rank that only computes) it keeps silent."""

    def __init__(self, run: RunDirectory | None, publish: Callable[[Event], None]) -> None:
        self._publish, self._run = publish, run
        self._store = StoreWriter(run) if run else None
        self._log = _open_log(run.log_path) if run else None
        self._lines = LineWriter(with_clock=True)
        self._store_problem: str | None = None
        self.state = State.LOADING

    @property
    def attempt(self) -> int:
        """The id of this attempt, once it has begun."""
        return self._store.attempt if self._store else 0

    @property
    def stored(self) -> bool:
        """False while something still waits for the store."""
        return self._store_problem is None

    @property
    def _is_new(self) -> bool:
        """Whether nothing of the run has begun yet, now or earlier."""
        return not (self.attempt or self._run is None or self._run.checkpoints_path.exists() or self._run.attempts())

    def begin_attempt(self, from_step: int, total_steps: int, newest_known: int) -> int:
        """Opens an attempt; one that is under way ends with it, as the run goes back to `from_step`."""
        if self._store is not None and self._store.attempt:
            self._store.set_state(State.STOPPED, f"went back to step {from_step}")
        attempt = self._store.begin_attempt(from_step, total_steps, newest_known) if self._store else 1
        self.flush()
        return attempt

    def say(self, event: Event) -> None:
        """Publishes an event, writes its line to the log and, unless it is a step or a piece of chat, stores it."""
        if self._store is None:
            return
        self._publish(event)
        self._write_log(event)
        if not isinstance(event, _NOT_STORED):
            self._store.record_event(event)
            self.flush()

    def store(self, event: Event) -> None:
        """Stores a reading of the machine, or what was said and logged elsewhere."""
        if self._store is None:
            return
        if isinstance(event, Reading):
            self._store.record_reading(event)
        else:
            self._store.record_event(event)
        self.flush()

    def enter(self, state: State, reason: str = "") -> None:
        """Says and stores that the run is now in `state`."""
        self.state = state
        if self._store is not None and self._store.attempt:
            self._store.set_state(state, reason)
        self.say(StateChanged(state=state, reason=reason))

    def end(self, event: RunEnded) -> None:
        """Stores how the attempt ended and closes: nothing can be said any more. The event itself is not published."""
        if self._store is not None:
            if event.state is State.STOPPED and self._is_new:
                self._store.begin_attempt(0, 0)  # it was stopped before it could begin; lists of runs say so
            if self._store.attempt:
                self._store.set_state(event.state, event.reason)
            self._store.record_event(event)
            if problem := self._store.close():
                self._warn(f"run.sqlite could not be written: {problem}")
        self._write_log(event)
        if self._log is not None:
            with contextlib.suppress(OSError):  # a full disk
                self._log.close()

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        """Stores the values of a step."""
        if self._store is not None:
            self._store.record(step, metrics)
            self.flush()

    def flush(self) -> None:
        """Writes what waits for the store; says once when that fails, and once when it works again."""
        if self._store is not None:
            self._heed(self._store.flush())

    def settle(self) -> None:
        """As `flush`, and puts it on the medium, so that no checkpoint is newer than the steps that led to it."""
        if self._store is not None:
            self._heed(self._store.settle())

    def _heed(self, problem: str | None) -> None:
        if problem == self._store_problem:
            return
        self._store_problem = problem
        if problem:
            self._warn(f"run.sqlite could not be written ({problem}); what is measured is kept in memory until it can")
        else:
            self.say(Notice(text="run.sqlite could be written again; nothing was lost"))

    def _warn(self, text: str) -> None:
        """Says that the store cannot be written, without waiting for it."""
        alarm = Alarm(level="critical", text=text)
        if self._store is not None:
            self._store.record_event(alarm)
        self._publish(alarm)
        self._write_log(alarm)

    def _write_log(self, event: Event) -> None:
        if self._log is None:
            return
        with contextlib.suppress(OSError):  # a full disk; the store says so
            self._log.writelines(line + "\n" for line in self._lines.lines(event))


def _open_log(path: Path) -> IO[str]:
    try:
        return path.open("a", encoding="utf-8", buffering=1)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from None
