"""An engine at work, for tests: what it says is read until something wanted comes."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from engine.backend import mx
from engine.checkpoint import Checkpoint
from engine.commands import Command
from engine.events import Event, RunEnded, StepCompleted
from engine.host import Machine
from engine.profile import Profile
from engine.store import RunDirectory
from engine.worker import Engine

PATIENCE_SECONDS = 60


class Ride:
    """An engine at work and a reader of its events."""

    def __init__(
        self, run: RunDirectory, profile: Profile, resume_from: str | None = None, machine: Machine | None = None
    ) -> None:
        self.run = run
        self.engine = Engine(run, profile, resume_from, machine=machine, look_every_seconds=0.05 if machine else 1.0)
        self._mailbox = self.engine.subscribe()
        self.events: list[Event] = []
        self.engine.start()

    def send(self, command: Command) -> None:
        self.engine.send(command)

    def until(self, wanted: Callable[[Event], bool]) -> Event:
        """Reads on until an event is wanted; fails when the run ends before."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        position = 0
        while time.monotonic() < deadline:
            for event in self._mailbox.take(0.1):
                self.events.append(event)
            for event in self.events[position:]:
                if wanted(event):
                    return event
            position = len(self.events)
            assert self.engine.ended is None or self._mailbox.take() == [], "the run ended before"
        raise AssertionError(f"waited {PATIENCE_SECONDS} s in vain; last was {self.events[-1:]}")

    def until_step(self, step: int) -> None:
        self.until(lambda event: isinstance(event, StepCompleted) and event.step >= step)

    def end(self) -> RunEnded:
        ended = self.engine.join(PATIENCE_SECONDS)
        assert ended is not None, "the run does not end"
        self.events += self._mailbox.take()
        return ended

    def of(self, kind: type) -> list:  # type: ignore[type-arg]
        return [event for event in self.events if isinstance(event, kind)]


Start = Callable[..., Ride]


def losses(run: RunDirectory) -> list[float]:
    steps, values = run.curve("loss")
    assert steps.tolist() == list(range(1, len(steps) + 1))
    return values.tolist()


def weights(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    loaded = mx.load(str(checkpoint.path / "model.safetensors"))
    assert isinstance(loaded, dict)
    return {name: np.array(array) for name, array in loaded.items()}


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)
