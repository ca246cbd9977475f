"""A running engine as the screen sees it: commands go in, events come out, the run directory is the truth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

from engine.commands import Command
from engine.events import Event, State
from engine.store import RunDirectory


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionLost(Event):
    """Nothing more will be heard of the run, and it has not said its end. The client says so itself."""

    kind: ClassVar[str] = "connection_lost"
    text: str
    word: str
    """For the run's state: `interrupted` where the process that trained is gone, else it may still train."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reconnected(Event):
    """The connection broke and was made again; meanwhile steps may have been missed, which the store has."""

    kind: ClassVar[str] = "reconnected"
    state: State
    """What the run is doing now."""


class Client(Protocol):
    """One run, wherever it lives."""

    @property
    def run(self) -> RunDirectory:
        """The run's folder and store, for history."""

    @property
    def here(self) -> bool:
        """True where this process trains it, and its end is this process's business."""

    @property
    def looks_only(self) -> bool:
        """True where commands are refused."""

    @property
    def alive(self) -> bool:
        """False once `RunEnded` (or `ConnectionLost`) has been said and nothing more will come."""

    def send(self, command: Command) -> None:
        """Hands a command to the engine; never waits."""

    def events(self, timeout_seconds: float = 0.0) -> list[Event]:
        """All events since the last call, oldest first; waits at most `timeout_seconds` for a first one.

        A slow reader may miss old steps, nothing else.
        """

    def close(self) -> None:
        """Nobody reads here any more. The run goes on."""
