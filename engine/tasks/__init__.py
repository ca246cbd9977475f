"""Kinds of runs, one file each: what model, data and loss, what to save, how to answer. The trainer knows none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from engine.backend import mx
from engine.commands import Generate
from engine.loading import Loading
from engine.models.anatomy import Anatomy
from engine.ops.dropout import Keys
from engine.profile import LoRAProfile, Profile, RetentionProfile

import mlx.nn as nn


@dataclass(frozen=True)
class Batch:
    """What is in memory at once: the arrays that a task's `loss` takes, and how many tokens it sums over.

    Of the `places` that are computed, `real` hold a token; the rest is padding.
    """

    arrays: tuple[mx.array, ...]
    tokens: int
    real: int
    places: int


class Task(Protocol):
    """One kind of run, made and used on the engine's worker thread."""

    @property
    def model(self) -> nn.Module:
        """The shape that computes; its weights are set before every use."""

    @property
    def anatomy(self) -> Anatomy | None:
        """Where the model can be cut, for the layerwise way (engine.layerwise); None for what is no stack of layers."""

    data_digest: str
    """Changes whenever the training data do."""

    keys: Keys
    """Where the model's dropout takes its masks from; the caller begins it anew for every micro-batch."""

    size: int
    """Numbers that the model consists of, trained or not."""

    vocabulary: int
    """Rows of the output layer; 0 where there is none."""

    def total_steps(self) -> int:
        """Length of the run in optimizer updates."""

    def examples(self, step: int, rank: int, ranks: int) -> Sequence[int]:
        """This rank's part of the batch of `step` (from 1): a pure function of the profile and the step."""

    def batch(self, examples: Sequence[int]) -> Batch:
        """Some examples of the training data, to be in memory at once."""

    def heldout(self, size: int, most: int | None = None) -> Iterator[Batch]:
        """The held-out data, each token once, `size` examples at a time; with `most`, only so many from the start."""

    def loss(self, *arrays: mx.array) -> mx.array:
        """The summed loss of a batch in nats, float32, with the model's present weights."""

    def predicting(self, *arrays: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """Of a batch, with `anatomy`: what is read, what is to be predicted, and whether it counts; [batch, time]."""

    def heldout_metrics(self, loss_sum: float, tokens: int) -> Mapping[str, float]:
        """`val_loss` and what else the held-out loss says."""

    def part_of(self, parameter: str) -> str:
        """The part of the model that a parameter belongs to, for grad norms by part."""

    borrowed_weights: bool
    """True where a new run begins with the weights of something outside of it (`model.init_from`)."""

    def initial_parameters(self) -> Any:
        """The weights to begin with at step 0: borrowed ones, or random ones, each time the same."""

    def load(self, folder: Path) -> Any:
        """The weights that `save` wrote. Raises `UserError` where they are those of another model."""

    def save(self, parameters: Any, folder: Path) -> None:
        """Writes a folder that can be used elsewhere as it is."""

    def answer(self, parameters: Any | None, ask: Generate) -> Iterator[str | None]:
        """An answer a token at a time: a piece of text (which may be empty), or None while still reading the prompt.

        Without `parameters` the base answers: what there was before anything was learned.
        """


def make_task(
    profile: Profile, runs_folder: Path, checkpoint: Path | None = None, loading: Loading | None = None
) -> Task:
    """Loads what a profile's kind needs: data, tokenizer, model. `checkpoint` is the folder of one to resume from."""
    # A kind's imports are paid for when it is run.
    match profile:
        case RetentionProfile():
            from engine.tasks.retention_lm import RetentionLMTask

            return RetentionLMTask(profile, runs_folder, checkpoint)
        case LoRAProfile():
            from engine.tasks.lora import LoRATask

            return LoRATask(profile, runs_folder, checkpoint, loading or Loading())
    raise AssertionError(f"no task for {profile.kind}")
