"""Guards, one small class each: it looks at the run or at the machine and answers with actions.

The trainer carries them out between micro-batches and says so; a guard itself changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.outcome import Outcome


@dataclass(frozen=True, slots=True)
class Warn:
    """Tell the owner, `critical` or as a mere warning. `guard` is who says so."""

    guard: str
    text: str
    critical: bool = False


@dataclass(frozen=True, slots=True)
class Tell:
    """A line for the log: something has passed."""

    text: str


@dataclass(frozen=True, slots=True)
class ClearCache:
    """Give back the memory that MLX keeps for later."""

    reason: str


@dataclass(frozen=True, slots=True)
class Shrink:
    """Halve the micro-batch and double accumulation: less memory, the same step."""

    reason: str


@dataclass(frozen=True, slots=True)
class Hold:
    """Checkpoint, then pause until the guard lets go, or the owner does."""

    reason: str


@dataclass(frozen=True, slots=True)
class LetGo:
    """The reason to hold has passed."""

    reason: str


@dataclass(frozen=True, slots=True)
class End:
    """Checkpoint and end the run."""

    outcome: Outcome


Action = Warn | Tell | ClearCache | Shrink | Hold | LetGo | End
