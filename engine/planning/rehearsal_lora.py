"""Steps of a fine-tuning with random numbers: no download, no tokenizer, no rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.backend import compute_dtype, mx
from engine.loading import Loading
from engine.models.pretrained import Base, cast, instantiate
from engine.planning.geometry import geometry
from engine.profile import LoRAProfile
from engine.tasks import Batch
from engine.tasks.lora import LoRATask

from mlx.utils import tree_flatten, tree_map


class LoRARehearsal(LoRATask):
    """A base of random weights, of the shape that the profile's has, and rows as long as they may be."""

    def __init__(self, profile: LoRAProfile) -> None:  # not its parent's, which loads the base and reads the rows
        self._profile, self._train, self._borrowed = profile, profile.train, None
        base = geometry(profile).base
        model = instantiate(base.config)
        cast(model, compute_dtype(profile.train.dtype))
        for _, array in tree_flatten(model.parameters()):
            mx.eval(array)  # one after the other: what they are drawn from is larger
        self._take(Base(model, None, dict(base.config), base.name, Path()), Loading())

    def batch(self, examples: Sequence[int]) -> Batch:
        count, length = len(examples), self._train.sequence_length
        rows = mx.random.randint(0, self.vocabulary, (count, length + 1), dtype=mx.int32)
        counted = mx.ones((count, length), dtype=mx.bool_)
        mx.eval(rows, counted)
        return Batch((rows, counted), *(3 * (count * length,)))

    def initial_parameters(self) -> Any:
        return tree_map(lambda array: array.astype(mx.float32), self.model.trainable_parameters())
