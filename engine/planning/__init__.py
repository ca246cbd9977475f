"""What a step of each kind of run keeps in memory and how much it computes, known before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from engine.profile import Profile

FROZEN = "frozen_weights"
TRAINED = "trained_weights"
COPIES = "compute_copies"
GRADIENTS = "gradients"
OPTIMIZER = "optimizer_state"
ACTIVATIONS = "activations"
LOGITS = "logits_and_loss"
STATES = "retention_states"
UPDATE = "update"
DATA = "data"
IN_MLX = (FROZEN, TRAINED, COPIES, OPTIMIZER, GRADIENTS, ACTIVATIONS, LOGITS, STATES, UPDATE, DATA)
"""Components of MLX's peak, in the order in which they are told; `UPDATE` is what the optimizer makes anew."""


@dataclass(frozen=True)
class Setting:
    """Where a step is computed, as far as memory depends on it."""

    gpu: bool = False
    compute_bytes: int = 4
    """Of a number in the dtype of the computation: 4 or 2."""
    ranks: int = 1
    buffer_mb: int = 64
    """MLX_MAX_MB_PER_BUFFER, on GPUs: engine.planning.in_flight."""


@dataclass(frozen=True)
class Moment:
    """What is alive at once at one moment of a step, by component. A step's peak is that of its largest moment."""

    name: str
    bytes: Mapping[str, int]

    @property
    def total_bytes(self) -> int:
        return sum(self.bytes.values())


class Demand(Protocol):
    """What one kind of run demands. A module of engine/planning/ is one; it is pure arithmetic on a profile."""

    def parameters(self, profile: Profile) -> int:
        """Numbers that the model consists of."""

    def moments(self, profile: Profile, setting: Setting) -> list[Moment]:
        """The moments of a step that may be its peak."""

    def shape(self, profile: Profile) -> tuple[Any, ...]:
        """What the time of a step depends on beside `[train]`."""

    def operations(self, profile: Profile) -> float:
        """Floating-point operations of a whole step, a product and its sum counted as two."""


def demand_of(profile: Profile) -> Demand:
    """The arithmetic of a profile's kind."""
    from engine.planning import retention_lm  # a kind's imports are paid for when it is planned

    kinds: dict[str, Demand] = {"retention-lm": retention_lm}
    return kinds[profile.kind]


def micro_batch(profile: Profile, ranks: int = 1) -> int:
    """Sequences in memory at once on one rank."""
    share = max(1, profile.train.batch_size // ranks)
    return min(profile.train.at_once or share, share)


def micro_batches(profile: Profile, ranks: int = 1) -> int:
    """How many of them make one rank's part of a step."""
    return -(-max(1, profile.train.batch_size // ranks) // micro_batch(profile, ranks))
