"""Losses as sums over tokens, so that micro-batches and ranks of any sizes add up."""

from __future__ import annotations

from engine.backend import mx


def cross_entropy_sum(logits: mx.array, targets: mx.array, counted: mx.array) -> mx.array:
    """−Σ log softmax(logits)[target] over the counted tokens, in nats, float32.

    Args:
        logits: [batch, time, vocabulary], of any floating dtype; the sum over the vocabulary is taken in float32.
        targets: token ids, [batch, time].
        counted: true where a token counts, [batch, time].
    """
    scores = mx.take_along_axis(logits, targets[..., None], axis=-1).squeeze(-1).astype(mx.float32)
    losses = mx.logsumexp(logits.astype(mx.float32), axis=-1) - scores
    return mx.where(counted, losses, 0).sum()
