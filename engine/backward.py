"""Two ways to the gradient of a micro-batch: one graph of the whole model, or a layer at a time (engine.layerwise)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

from engine.backend import mx, scalar
from engine.layerwise import Layerwise
from engine.models.anatomy import CannotCutError
from engine.profile import Train
from engine.tasks import Batch, Task

from mlx.utils import tree_map

Sums = tuple[mx.array, Any]
"""A summed loss in nats and its gradient, a tree like the parameters; float32."""

Pulse = Callable[[], None]
"""Called where others may be served: between layers. What it raises ends the micro-batch."""


class Backward(Protocol):
    """How gradients are made. `parameters` is a tree of float32 master weights."""

    def gradients(self, parameters: Any, batch: Batch, seed: int, previous: Sums | None, pulse: Pulse) -> Sums:
        """The sums of a batch, evaluated; those before are added (and not to be used any more). `seed` is dropout's."""

    def loss(self, parameters: Any, batch: Batch, pulse: Pulse) -> float:
        """The summed loss of a batch in nats, without gradients and without dropout."""


class Whole:
    """One graph, as the task computes it. `compiled` for GPUs, where it pays."""

    def __init__(self, task: Task, dtype: mx.Dtype, compiled: bool) -> None:
        self._task, self._dtype = task, dtype
        self._loss: Callable[..., mx.array] = partial(self._sum_of_losses, False)
        self._gradients: Callable[..., Sums] = mx.value_and_grad(partial(self._sum_of_losses, True))
        if compiled:
            self._loss, self._gradients = mx.compile(self._loss), mx.compile(self._gradients)

    def gradients(self, parameters: Any, batch: Batch, seed: int, previous: Sums | None, pulse: Pulse) -> Sums:
        sums = self._gradients(parameters, mx.random.key(seed), *batch.arrays)
        if previous is not None:
            sums = tree_map(mx.add, previous, sums)
            del previous
        mx.eval(sums)
        return sums

    def loss(self, parameters: Any, batch: Batch, pulse: Pulse) -> float:
        return scalar(self._loss(parameters, mx.random.key(0), *batch.arrays))

    def _sum_of_losses(self, training: bool, parameters: Any, key: mx.array, *arrays: mx.array) -> mx.array:
        self._task.model.train(training)
        self._task.keys.begin(key)
        self._task.model.update(tree_map(lambda array: array.astype(self._dtype), parameters))
        return self._task.loss(*arrays)


def make_backward(task: Task, train: Train, dtype: mx.Dtype, compiled: bool, warn: Callable[[str], None]) -> Backward:
    """What `train.backward` asks for; the whole way, said by `warn`, where a model cannot be taken layer by layer."""
    if train.backward == "layerwise":
        try:
            return Layerwise(task, dtype, compiled)
        except CannotCutError as error:
            warn(f"train.backward = layerwise is not possible with this model ({error}): taking the whole way")
    return Whole(task, dtype, compiled)
