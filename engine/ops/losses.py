"""Losses as sums over tokens, so that micro-batches and ranks of any sizes add up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

from engine.backend import mx
from engine.ops.recompute import split

LOGITS_AT_ONCE = 1 << 25
"""128 MiB of them in float32."""


def linear_cross_entropy_sum(
    hidden: mx.array, weight: mx.array, targets: mx.array, counted: mx.array, *, logits_at_once: int = LOGITS_AT_ONCE
) -> mx.array:
    """−Σ log softmax(hidden · weightᵀ)[target] over the counted tokens, in nats, float32.

    The logits of a chunk of tokens live only while it is worked on: its gradients are made together with its loss,
    since the gradient of a sum is known up to a factor. So the exponentials, which cost most, are taken once.

    Args:
        hidden: [tokens, width].
        weight: the output layer, [vocabulary, width], in the dtype of `hidden`.
        targets: token ids, [tokens].
        counted: true where a token counts, [tokens].
        logits_at_once: more are made in chunks of tokens, one after the other.
    """
    chunk = max(1, logits_at_once // weight.shape[0])
    cuts = list(range(chunk, hidden.shape[0], chunk))
    parts = zip(split(hidden, cuts, axis=0), mx.split(targets, cuts), mx.split(counted, cuts), strict=True)
    losses: list[mx.array] = []
    for rows, ids, mask in parts:
        waiting = mx.depends([rows], losses[-1:])[0] if losses else rows
        losses.append(_chunk_loss(ids, mask)(waiting, weight)[0])
    return mx.stack(losses).sum()


def _chunk_loss(targets: mx.array, counted: mx.array) -> Callable[..., list[mx.array]]:
    @mx.custom_function
    def loss_and_gradients(hidden: mx.array, weight: mx.array) -> list[mx.array]:
        """The summed loss, and its gradients with respect to both arguments."""
        logits = (hidden @ weight.T).astype(mx.float32)
        top = logits.max(axis=-1, keepdims=True)
        odds = mx.exp(logits - top)
        total = odds.sum(axis=-1, keepdims=True)
        right = mx.take_along_axis(logits, targets[:, None], axis=-1)
        losses = mx.where(counted, (mx.log(total) + top - right).squeeze(-1), 0)

        # d loss / d logits = odds / total − one-hot(target), for counted tokens; neither is written out.
        share = mx.where(counted[:, None], 1 / total, 0)
        one = counted.astype(hidden.dtype)[:, None]
        odds = odds.astype(hidden.dtype)
        to_hidden = (odds @ weight) * share.astype(hidden.dtype) - weight[targets] * one
        to_weight = (odds.T @ (hidden * share.astype(hidden.dtype))).at[targets].subtract(hidden * one)
        return [losses.sum(), to_hidden, to_weight]

    @loss_and_gradients.vjp
    def _backward(
        _primals: Sequence[mx.array], cotangents: Sequence[mx.array], outputs: Sequence[mx.array]
    ) -> tuple[mx.array, ...]:
        return tuple(cotangents[0].astype(gradient.dtype) * gradient for gradient in outputs[1:])

    return cast(Callable[..., list[mx.array]], loss_and_gradients)
