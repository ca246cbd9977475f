"""Gradient checkpointing in a fixed order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

from engine.backend import mx
from engine.ops.dropout import Keys

import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

Arrays = list[mx.array]


def recomputed(function: Callable[..., Arrays]) -> Callable[..., Arrays]:
    """`function` (arrays in, a list of arrays out), keeping only its inputs for the backward pass.

    `mx.checkpoint` recomputes as soon as the inputs are there and computes each gradient when somebody wants it, so
    the intermediates of every call may be alive at once. Here the recomputation waits for the gradients of the
    outputs, and no gradient is handed on before all are there: the intermediates of one call at a time are alive.
    Gradients flow to the arguments only, not to what `function` closes over; all arguments must be differentiable.
    """
    call = mx.custom_function(function)

    @call.vjp
    def _backward(primals: Sequence[mx.array], cotangents: Sequence[mx.array], _outputs: object) -> Arrays:
        _, gradients = mx.vjp(function, mx.depends(list(primals), list(cotangents)), list(cotangents))
        return mx.depends(gradients, gradients)

    return cast(Callable[..., Arrays], call)


def kept_layer(layer: nn.Module, x: mx.array, *args: Any, keys: Keys, **kwargs: Any) -> mx.array:
    """`layer(x, …)`, keeping all that its gradients need, with the same dropout as `recomputed_layer`."""
    keys.begin(keys.next())
    return layer(x, *args, **kwargs)


def recomputed_layer(layer: nn.Module, x: mx.array, *args: Any, keys: Keys | None = None, **kwargs: Any) -> mx.array:
    """`layer(x, …)` as `recomputed`: it keeps only x, and is as it was afterwards.

    Gradients flow to x and to what of the layer is trained. `keys` are those of its dropout: the same masks again.
    """
    trained = tree_flatten(layer.trainable_parameters())
    names, arrays = [name for name, _ in trained], [array for _, array in trained]
    key = keys.next() if keys is not None else None

    def run(x: mx.array, *arrays: mx.array) -> Arrays:
        if keys is not None and key is not None:
            keys.begin(key)
        own = layer.trainable_parameters()
        layer.update(tree_unflatten(list(zip(names, arrays, strict=True))))
        try:
            return [layer(x, *args, **kwargs)]
        finally:
            layer.update(own)

    return recomputed(run)(x, *arrays)[0]


def split(array: mx.array, indices: list[int], axis: int) -> Arrays:
    """`mx.split` with a gradient that concatenates those of the pieces.

    MLX's own adds up one array of full length for each piece when there are more than a few: quadratic in their number.
    """
    if not indices:
        return [array]
    call = mx.custom_function(lambda whole: mx.split(whole, indices, axis=axis))

    @call.vjp
    def _backward(_primal: mx.array, cotangents: Sequence[mx.array], _outputs: object) -> mx.array:
        return mx.concatenate(list(cotangents), axis=axis)

    return cast(Arrays, call(array))
