"""Optimizers, and the course of the learning rate."""

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


def make_optimizer(train: Train) -> optim.Optimizer:
    """What `train.optimizer` names; all but AdamW are MLX's own, which decay vectors too."""
    rate, betas, decay = train.learning_rate, [train.beta1, train.beta2], train.weight_decay
    match train.optimizer:
        case "adamw":
            return AdamW(train)
        case "adam":
            return optim.Adam(rate, betas=betas, bias_correction=True)
        case "lion":
            return optim.Lion(rate, betas=betas, weight_decay=decay)
        case "sgd":
            return optim.SGD(rate, momentum=train.momentum, weight_decay=decay)
        case "muon":
            return optim.Muon(rate, momentum=train.momentum, weight_decay=decay)
        case "adafactor":
            return optim.Adafactor(rate, relative_step=False, scale_parameter=False, weight_decay=decay)


def learning_rate(train: Train, step: int, total_steps: int) -> float:
    """The learning rate of the update that completes `step` (from 1): linear warm-up, then the schedule's course."""
    if step <= train.warmup_steps:
        return train.learning_rate * step / train.warmup_steps
    after = step - train.warmup_steps
    match train.schedule:
        case "constant":
            return train.learning_rate
        case "exponential":
            return max(train.learning_rate * train.decay_rate**after, train.final_learning_rate)
        case "step":
            times = after // train.decay_steps
            return max(train.learning_rate * train.decay_rate**times, train.final_learning_rate)
    progress = min(1.0, after / (max(1, total_steps - train.warmup_steps) + 1))  # the last step learns too
    falling = 0.5 * (1 + math.cos(math.pi * progress)) if train.schedule == "cosine" else 1 - progress
    return train.final_learning_rate + (train.learning_rate - train.final_learning_rate) * falling
