"""AdamW and its learning-rate schedule."""

from __future__ import annotations

import math
from typing import Any

from engine.backend import mx
from engine.profile import Train

import mlx.optimizers as optim


class AdamW(optim.AdamW):
    """AdamW (arXiv 1711.05101) with bias correction whose decay spares vectors: norms' scales and biases."""

    def __init__(self, train: Train) -> None:
        super().__init__(
            learning_rate=train.learning_rate,
            betas=[train.beta1, train.beta2],
            weight_decay=train.weight_decay,
            bias_correction=True,
        )

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict[str, Any]) -> mx.array:
        if parameter.ndim >= 2:
            return super().apply_single(gradient, parameter, state)
        return optim.Adam.apply_single(self, gradient, parameter, state)


def learning_rate(train: Train, step: int, total_steps: int) -> float:
    """The learning rate of the update that completes `step` (from 1): linear warm-up, then the schedule's course."""
    if step <= train.warmup_steps:
        return train.learning_rate * step / train.warmup_steps
    if train.schedule == "constant":
        return train.learning_rate
    progress = min(1.0, (step - train.warmup_steps) / max(1, total_steps - train.warmup_steps))
    falling = 0.5 * (1 + math.cos(math.pi * progress)) if train.schedule == "cosine" else 1 - progress
    return train.final_learning_rate + (train.learning_rate - train.final_learning_rate) * falling
