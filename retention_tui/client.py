"""A running engine as the screen sees it: commands go in, events come out, the run directory is the truth."""

from __future__ import annotations

from typing import Protocol

from engine.commands import Command
from engine.events import Event
from engine.store import RunDirectory


class Client(Protocol):
    """One run, wherever it lives."""

    @property
    def run(self) -> RunDirectory:
        """The run's folder and store, for history."""

    @property
    def alive(self) -> bool:
        """False once `RunEnded` has been said and nothing more will come."""

    def send(self, command: Command) -> None:
        """Hands a command to the engine; never waits."""

    def events(self) -> list[Event]:
        """All events since the last call, oldest first; never waits. A slow reader may miss old steps, nothing else."""
