"""What a run says, to everyone who should know: subscribers, the store and log.txt."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import IO

from engine.events import (
    Alarm,
    AnswerEnded,
    AnswerStarted,
    AnswerText,
    Event,
    RunEnded,
    State,
    StateChanged,
    StepCompleted,
)
from engine.lines import LineWriter
from engine.store import RunDirectory, StoreWriter

_NOT_STORED = (StepCompleted, AnswerStarted, AnswerText, AnswerEnded)


class Journal:
    """Owned by the worker thread. Without a run (a rank that only computes) it keeps silent."""

    def __init__(self, run: RunDirectory | None, publish: Callable[[Event], None]) -> None:
        self._publish = publish
        self._store = StoreWriter(run) if run else None
        self._log: IO[str] | None = run.log_path.open("a", encoding="utf-8", buffering=1) if run else None
        self._lines = LineWriter(with_clock=True)
        self._store_problem: str | None = None

    @property
    def attempt(self) -> int:
        """The id of this attempt, once it has begun."""
        return self._store.attempt if self._store else 0

    def begin_attempt(self, from_step: int, total_steps: int) -> int:
        attempt = self._store.begin_attempt(from_step, total_steps) if self._store else 1
        self.flush()
        return attempt

    def say(self, event: Event) -> None:
        """Publishes an event, writes its line to the log and, unless it is a step or a piece of chat, stores it."""
        if self._store is None:
            return
        self._publish(event)
        for line in self._lines.lines(event):
            self._write_log(line)
        if not isinstance(event, _NOT_STORED):
            self._store.record_event(event)
            self.flush()

    def enter(self, state: State, reason: str = "") -> None:
        """Says and stores that the run is now in `state`."""
        if self._store is not None and self._store.attempt:
            self._store.set_state(state, reason)
        self.say(StateChanged(state=state, reason=reason))

    def end(self, event: RunEnded) -> None:
        """Says and stores how the attempt ended."""
        if self._store is not None and self._store.attempt:
            self._store.set_state(event.state, event.reason)
        self.say(event)

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        """Stores the values of a step."""
        if self._store is not None:
            self._store.record(step, metrics)
            self.flush()

    def flush(self) -> None:
        """Writes what waits for the store; says once when that fails, and once when it works again."""
        if self._store is None:
            return
        problem = self._store.flush()
        if problem == self._store_problem:
            return
        self._store_problem = problem
        if problem:
            text = f"run.sqlite could not be written ({problem}); what is measured is kept in memory until it can"
            self._publish(Alarm(level="critical", text=text))
            self._write_log(text)

    def close(self) -> None:
        if self._store is not None:
            self._store.close()
        if self._log is not None:
            self._log.close()

    def _write_log(self, line: str) -> None:
        if self._log is None:
            return
        try:
            self._log.write(line + "\n")
        except OSError:  # a full disk; the store says so
            return
