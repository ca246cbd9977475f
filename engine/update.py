"""One optimizer update: gradients of micro-batches as sums over tokens, their norm, the clipped step.

Sums, not means: so any split of a batch into micro-batches, and over ranks, gives the same step.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from engine.backend import mx, scalar
from engine.backward import Pulse, Sums, Whole, make_backward
from engine.optimizer import make_optimizer
from engine.profile import Train
from engine.ranks import Ranks
from engine.tasks import Batch, Task

from mlx.utils import tree_flatten, tree_map, tree_unflatten


@dataclass(frozen=True)
class Gradient:
    """A whole step's gradient, evaluated, not yet applied.

    `loss` is nats a token; norms are of the mean gradient a token, before clipping, in total and by part of the model.
    `tokens` are those that count; of the `places` that were computed, `real` hold a token, not padding.
    """

    sums: Any
    tokens: int
    real: int
    places: int
    loss: float
    norm: float
    part_norms: dict[str, float]


class Update:
    """Weights and optimizer of a run, and the functions that move them.

    `parameters` is a tree of float32 master weights; the task's model is only the shape that computes with them, in
    `dtype`. `compiled` for GPUs, where it pays.
    """

    def __init__(
        self,
        task: Task,
        train: Train,
        ranks: Ranks,
        dtype: mx.Dtype,
        compiled: bool,
        warn: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.parameters: Any = task.model.trainable_parameters()
        self.optimizer = make_optimizer(train)
        self.optimizer.init(self.parameters)
        self._task, self._train, self._ranks = task, train, ranks
        self._backward = make_backward(task, train, dtype, compiled, warn)
        self.by_layer = not isinstance(self._backward, Whole)
        self._sums: Sums | None = None
        self._tokens = self._real = self._places = 0
        self.intact = True
        """False once moving the weights has failed half-way."""
        self._apply: Callable[..., tuple[Any, Any]] = self._scale_and_apply
        if compiled:
            self._apply = mx.compile(self._apply)

    def accumulate(self, batch: Batch, seed: int = 0, pulse: Pulse = lambda: None) -> None:
        """Adds one micro-batch's loss and gradients, and evaluates the sums; what `pulse` raises drops them all.

        `seed` is that of its dropout; `pulse` is called where others may be served meanwhile.
        """
        before = [self._sums]
        self._sums = None  # held by nothing else, so that the new sums can take its memory
        self._sums = self._backward.gradients(self.parameters, batch, seed, before.pop(), pulse)
        self._tokens += batch.tokens
        self._real += batch.real
        self._places += batch.places

    def drop(self) -> None:
        """Forgets what was accumulated."""
        self._sums = None
        self._tokens = self._real = self._places = 0

    def collect(self) -> Gradient:
        """The gradient of all that was accumulated since the last call, on all ranks. Weights are untouched."""
        assert self._sums is not None, "nothing was accumulated"
        loss, sums = self._ranks.sum(self._sums)
        counts = self._ranks.sum(mx.array([self._tokens, self._real, self._places]))
        tokens, real, places = (int(count) for count in cast(list[int], counts.tolist()))
        self.drop()
        squares: dict[str, mx.array] = defaultdict(lambda: mx.array(0.0))
        for name, gradient in tree_flatten(sums):
            squares[self._task.part_of(name)] += gradient.astype(mx.float32).square().sum()
        mx.eval(loss, sums, squares)
        parts = {part: scalar(square) / tokens**2 for part, square in squares.items()}
        return Gradient(
            sums=sums,
            tokens=tokens,
            real=real,
            places=places,
            loss=scalar(loss) / tokens,
            norm=math.sqrt(sum(parts.values())),
            part_norms={part: math.sqrt(square) for part, square in sorted(parts.items())},
        )

    def apply(self, gradient: Gradient, learning_rate: float) -> None:
        """Clips by the global norm and moves the weights."""
        scale = 1.0 / gradient.tokens
        if self._train.clip_norm and gradient.norm > self._train.clip_norm:
            scale *= self._train.clip_norm / gradient.norm
        self.intact = False
        self.optimizer.learning_rate = learning_rate
        self.parameters, self.optimizer.state = self._apply(
            self.parameters, self.optimizer.state, gradient.sums, mx.array(scale)
        )
        mx.eval(self.parameters, self.optimizer.state)
        self._task.model.update(self.parameters)  # what it had before is in nobody's way
        self.intact = True

    def loss(self, batch: Batch, pulse: Pulse = lambda: None) -> float:
        """The summed loss of a batch in nats, without gradients and without dropout."""
        return self._backward.loss(self.parameters, batch, pulse)

    def optimizer_state(self) -> dict[str, mx.array]:
        """The optimizer's state as flat names and arrays, for a checkpoint."""
        return dict(tree_flatten(self.optimizer.state))

    def restore(self, parameters: Any, optimizer_state: Mapping[str, mx.array] | None) -> None:
        """Takes weights and the optimizer's state, a fresh one where there is none; forgets what was accumulated."""
        self.intact = False
        self.parameters = parameters
        if optimizer_state is None:
            self.optimizer = make_optimizer(self._train)
            self.optimizer.init(parameters)
        else:
            self.optimizer.state = tree_unflatten(list(optimizer_state.items()))
        self.drop()
        mx.eval(self.parameters, self.optimizer.state)
        self._task.model.update(self.parameters)
        self.intact = True

    def agree(self) -> None:
        """Gives every rank the chief's weights and optimizer state."""
        self.intact = False
        self.parameters = self._ranks.from_chief(self.parameters)
        self.optimizer.state = self._ranks.from_chief(self.optimizer.state)
        mx.eval(self.parameters, self.optimizer.state)
        self._task.model.update(self.parameters)
        self.intact = True

    def _scale_and_apply(self, parameters: Any, state: Any, sums: Any, scale: mx.array) -> tuple[Any, Any]:
        self.optimizer.state = state
        parameters = self.optimizer.apply_gradients(tree_map(lambda array: array * scale, sums), parameters)
        return parameters, self.optimizer.state
