"""What can be asked of a running engine.

Commands are frozen values. Sending one never waits: the engine's worker thread takes it between two micro-batches,
and what came of it is said by an event (`engine.events`).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Pause:
    """Stop training after the current micro-batch, keep everything in memory, go on serving commands."""


@dataclass(frozen=True, slots=True)
class Resume:
    """Go on after `Pause`; with `overrule` also where a guard holds the run."""

    overrule: bool = True


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Write a checkpoint of the last completed step now."""


@dataclass(frozen=True, slots=True)
class Validate:
    """Measure the held-out loss of the last completed step now."""


@dataclass(frozen=True, slots=True)
class Stop:
    """End the run at the next micro-batch: write a checkpoint, then leave.

    A partial accumulation is dropped; it is done again, with the same numbers, when the run is resumed.
    """

    reason: str = "stopped on request"
    checkpoint: bool = True


@dataclass(frozen=True, slots=True)
class Generate:
    """Answer `prompt` token by token, while training goes on; two at once, others wait.

    With the live weights, or with the `base`: what there was before anything was learned.

    `answer` is chosen by the asker and comes back in every event about this answer. Temperature 0 is greedy.
    """

    answer: str
    prompt: str
    max_tokens: int = 256
    temperature: float = 0.7
    top_p: float = 0.9
    seed: int = 0
    base: bool = False


@dataclass(frozen=True, slots=True)
class CancelGeneration:
    """End one answer at its next token."""

    answer: str


@dataclass(frozen=True, slots=True)
class Set:
    """Change a setting of the running profile from the next step on: `Set("train.learning_rate", "1e-4")`.

    Only what can change without making it another run; a notice or an alarm says what came of it.
    """

    key: str
    value: str


Command = Pause | Resume | Checkpoint | Validate | Stop | Generate | CancelGeneration | Set
