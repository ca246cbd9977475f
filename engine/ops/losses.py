"""Losses as sums over tokens, so that micro-batches and ranks of any sizes add up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

from engine.backend import mx, on_gpu

from mlx.utils import tree_flatten, tree_unflatten

LOGITS_AT_ONCE = 1 << 25
"""128 MiB of them in float32."""


def linear_cross_entropy_sum(
    hidden: mx.array, weight: mx.array, targets: mx.array, counted: mx.array, *, logits_at_once: int = LOGITS_AT_ONCE
) -> mx.array:
    """−Σ log softmax(hidden · weightᵀ)[target] over the counted tokens, in nats, float32.

    The gradient of a sum is known up to a factor, so a chunk of tokens makes its gradients together with its loss:
    its logits live only while it is worked on, and the exponentials, which cost most, are taken once.

    Args:
        hidden: [tokens, width].
        weight: the output layer, [vocabulary, width], in the dtype of `hidden`.
        targets: token ids, [tokens].
        counted: true where a token counts, [tokens].
        logits_at_once: more are made in chunks of tokens, one after the other.
    """
    chunk = max(1, logits_at_once // weight.shape[0])
    cuts = list(range(chunk, hidden.shape[0], chunk))

    @mx.custom_function
    def loss_and_gradients(hidden: mx.array, weight: mx.array) -> list[mx.array]:
        losses: list[mx.array] = []
        to_hidden: list[mx.array] = []
        to_weight: mx.array | None = None
        for rows, ids, mask in zip(*(mx.split(array, cuts) for array in (hidden, targets, counted)), strict=True):
            if to_weight is not None:  # the chunk before is done with its logits
                rows = mx.depends([rows], [losses[-1], to_hidden[-1], to_weight])[0]  # noqa: PLW2901
            loss, slopes = _loss_and_slopes(rows @ weight.T, ids, mask)
            slopes = slopes.astype(hidden.dtype)
            losses.append(loss)
            to_hidden.append(slopes @ weight)
            part = (slopes.T @ rows).astype(mx.float32)
            to_weight = part if to_weight is None else to_weight + part
        return [mx.stack(losses).sum(), mx.concatenate(to_hidden), cast(mx.array, to_weight)]

    @loss_and_gradients.vjp
    def _backward(
        primals: Sequence[mx.array], cotangents: Sequence[mx.array], outputs: Sequence[mx.array]
    ) -> tuple[mx.array, ...]:
        factor = cotangents[0]
        return tuple(
            (factor * gradient).astype(primal.dtype) for primal, gradient in zip(primals, outputs[1:], strict=True)
        )

    return cast(list[mx.array], loss_and_gradients(hidden, weight))[0]


def cross_entropy_sum(logits: mx.array, targets: mx.array, counted: mx.array) -> mx.array:
    """−Σ log softmax(logits)[target] over the counted tokens, in nats, float32.

    Args:
        logits: [tokens, vocabulary].
        targets: token ids, [tokens].
        counted: true where a token counts, [tokens].
    """
    if on_gpu():  # MLX's own kernels read the logits once each way
        return mx.where(counted, mx.fast.cross_entropy(logits, targets), 0).sum()

    @mx.custom_function
    def loss_and_slopes(logits: mx.array) -> list[mx.array]:
        return list(_loss_and_slopes(logits, targets, counted))

    @loss_and_slopes.vjp
    def _backward(primal: mx.array, cotangents: Sequence[mx.array], outputs: Sequence[mx.array]) -> mx.array:
        return (cotangents[0] * outputs[1]).astype(primal.dtype)

    return cast(list[mx.array], loss_and_slopes(logits))[0]


def tokens_at_once(vocabulary: int, gpu: bool) -> int:
    """Tokens whose logits are made at once, where the head is not trained: whole 32s of them.

    A CPU, where nothing is lost between chunks, has smaller ones, but for large vocabularies, whose weights are read
    again for each.
    """
    logits, fewest = (LOGITS_AT_ONCE, 32) if gpu else (LOGITS_AT_ONCE // 4, 128)
    return max(fewest, logits // vocabulary // 32 * 32)


Head = Callable[[Any, mx.array], mx.array]
"""`head(weights, rows)`: logits [tokens, vocabulary] of hidden states [tokens, width]."""


def head_cross_entropy_sum(
    head: Head, weights: Any, hidden: mx.array, targets: mx.array, counted: mx.array, *, tokens_at_once: int
) -> mx.array:
    """As `linear_cross_entropy_sum`, for any head: a chunk of tokens makes its gradients together with its loss.

    Args:
        head: see `Head`; gradients flow to its arguments alone.
        weights: a tree of those of its weights that are trained; may be empty.
        hidden: [tokens, width].
        tokens_at_once: so many make a chunk.
    """
    names, arrays = cast(tuple[list[str], list[mx.array]], list(zip(*tree_flatten(weights), strict=True)) or ([], []))
    cuts = list(range(tokens_at_once, hidden.shape[0], tokens_at_once))

    @mx.custom_function
    def loss_and_gradients(hidden: mx.array, *arrays: mx.array) -> list[mx.array]:
        def chunk_loss(rows: mx.array, *arrays: mx.array, ids: mx.array, mask: mx.array) -> mx.array:
            tree = tree_unflatten(list(zip(names, arrays, strict=True)))
            return cross_entropy_sum(head(tree, rows), ids, mask)

        losses: list[mx.array] = []
        to_hidden: list[mx.array] = []
        to_weights: list[mx.array] = []
        every = list(range(1 + len(arrays)))
        for rows, ids, mask in zip(*(mx.split(array, cuts) for array in (hidden, targets, counted)), strict=True):
            if losses:  # the chunk before is done with its logits
                rows = mx.depends([rows], [losses[-1], to_hidden[-1], *to_weights])[0]  # noqa: PLW2901
            loss, gradients = mx.value_and_grad(chunk_loss, argnums=every)(rows, *arrays, ids=ids, mask=mask)
            slopes, *parts = gradients if arrays else (gradients,)  # of a single argument it is no tuple
            losses.append(loss)
            to_hidden.append(slopes)
            parts = [part.astype(mx.float32) for part in parts]
            to_weights = [a + b for a, b in zip(to_weights, parts, strict=True)] if to_weights else parts
        return [mx.stack(losses).sum(), mx.concatenate(to_hidden), *to_weights]

    @loss_and_gradients.vjp
    def _backward(
        primals: Sequence[mx.array], cotangents: Sequence[mx.array], outputs: Sequence[mx.array]
    ) -> tuple[mx.array, ...]:
        inputs = primals if isinstance(primals, list | tuple) else [primals]
        factor = cotangents[0]
        return tuple(
            (factor * gradient).astype(primal.dtype) for primal, gradient in zip(inputs, outputs[1:], strict=True)
        )

    return cast(list[mx.array], loss_and_gradients(hidden, *arrays))[0]


def _loss_and_slopes(logits: mx.array, targets: mx.array, counted: mx.array) -> tuple[mx.array, mx.array]:
    """The summed loss, and its derivative by the logits: softmax − one-hot(target) where a token counts; float32."""
    logits = logits.astype(mx.float32)
    top = logits.max(axis=-1, keepdims=True)
    odds = mx.exp(logits - top)
    total = odds.sum(axis=-1, keepdims=True)
    right = mx.take_along_axis(logits, targets[:, None], axis=-1)
    losses = mx.where(counted[:, None], mx.log(total) + top - right, 0)
    slopes = odds * mx.where(counted[:, None], 1 / total, 0)
    at_target = mx.take_along_axis(slopes, targets[:, None], axis=-1) - counted[:, None]
    return losses.sum(), mx.put_along_axis(slopes, targets[:, None], at_target, axis=-1)
