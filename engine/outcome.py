"""How a run ends."""

from __future__ import annotations

from dataclasses import dataclass

from engine.errors import ExitCode
from engine.events import State


@dataclass(frozen=True, slots=True)
class Outcome:
    """The end of an attempt: its final state, why in words, and the exit code; `checkpoint` is false to write none."""

    state: State
    reason: str
    exit_code: ExitCode
    checkpoint: bool = True
