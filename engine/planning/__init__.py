"""What a step of each kind of run keeps in memory and how much it computes, known before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from engine.errors import UserError
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

CHECKPOINTING: Mapping[str, str] = {
    "train.gradient_checkpointing=true": "gradient checkpointing: the same numbers, about a third slower"
}
LAYERWISE: Mapping[str, str] = {
    "train.backward=layerwise": "layer by layer: the same numbers, the least memory, somewhat slower"
}


@dataclass(frozen=True)
class Setting:
    """Where a step is computed, as far as memory depends on it."""

    gpu: bool = False
    compute_bytes: int = 4
    """Of a number in the dtype of the computation: 4 or 2."""
    ranks: int = 1
    buffer_mb: int = 64
    """MLX_MAX_MB_PER_BUFFER, on GPUs: engine.planning.in_flight."""
    metal: bool = False
    """Of GPUs, Apple's."""


@dataclass(frozen=True)
class Moment:
    """What is alive at once at one moment of a step, by component. A step's peak is that of its largest moment."""

    name: str
    bytes: Mapping[str, int]

    @property
    def total_bytes(self) -> int:
        return sum(self.bytes.values())


@dataclass(frozen=True)
class Saving:
    """Bytes of a step's peak that a measure saves, or would save where it is not `taken`."""

    name: str
    bytes: int
    taken: bool
    words: str
    """What it is instead of."""


class UnknownShapeError(UserError):
    """Nothing is wrong, but the shape of what is trained is not known yet."""


class Demand(Protocol):
    """What one kind of run demands. A module of engine/planning/ is one; it is arithmetic on a profile.

    Each raises `UnknownShapeError` where the shape of what is trained is not known before it is downloaded.
    """

    def parameters(self, profile: Profile) -> int:
        """Numbers that the model consists of."""

    def moments(self, profile: Profile, setting: Setting) -> list[Moment]:
        """The moments of a step that may be its peak."""

    def shape(self, profile: Profile) -> tuple[Any, ...]:
        """What the time of a step depends on beside `[train]`."""

    def operations(self, profile: Profile) -> float:
        """Floating-point operations of a whole step, a product and its sum counted as two."""

    def less_memory(self, profile: Profile) -> Mapping[str, str]:
        """Settings, beside smaller parts of a batch, that take less and leave the training what it is; the mildest
        first, each with what it means."""

    def savings(self, profile: Profile, setting: Setting) -> list[Saving]:
        """What each measure against memory saves."""

    def download_bytes(self, profile: Profile) -> int:
        """What has to be downloaded first."""


def demand_of(profile: Profile) -> Demand:
    """The arithmetic of a profile's kind."""
    # A kind's imports are paid for when it is planned.
    if profile.kind == "lora":
        from engine.planning import lora

        return lora
    from engine.planning import retention_lm

    return retention_lm


def micro_batch(profile: Profile, ranks: int = 1) -> int:
    """Sequences in memory at once on one rank."""
    share = max(1, profile.train.batch_size // ranks)
    return min(profile.train.at_once or share, share)


def micro_batches(profile: Profile, ranks: int = 1) -> int:
    """How many of them make one rank's part of a step."""
    return -(-max(1, profile.train.batch_size // ranks) // micro_batch(profile, ranks))
