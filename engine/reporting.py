"""What a step leaves behind: its metrics, for the store and whoever listens, and how long the rest will take."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

from engine.backend import memory_bytes
from engine.events import MemoryHeld, StepCompleted
from engine.journal import Journal
from engine.planning import FROZEN, GRADIENTS, OPTIMIZER, TRAINED
from engine.update import Gradient, Update

import mlx.nn as nn
from mlx.utils import tree_flatten

_WINDOW_STEPS = 100


class Reporter:
    """Tells of completed steps. The pace is that of the last steps, with validations and checkpoints between them."""

    def __init__(self, journal: Journal, total_steps: int) -> None:
        self._journal, self._total_steps = journal, total_steps
        self._seconds: deque[float] = deque(maxlen=_WINDOW_STEPS)
        self.restart()

    def restart(self) -> None:
        """What came before is no measure of what comes."""
        self._seconds.clear()
        self._told_at = time.monotonic()

    def tell(
        self,
        step: int,
        gradient: Gradient,
        learning_rate: float,
        micro_batch_size: int,
        trained_tokens: int,
        seconds: float,
        elapsed_seconds: float,
        paused_seconds: float,
    ) -> None:
        """A step that took `seconds`; `paused_seconds` have passed in pauses since the one before."""
        now = time.monotonic()
        self._seconds.append(now - self._told_at - paused_seconds)
        self._told_at = now
        metrics = {
            "loss": gradient.loss,
            "grad_norm": gradient.norm,
            **{f"grad_norm/{part}": norm for part, norm in gradient.part_norms.items()},
            "learning_rate": learning_rate,
            "steps_per_second": 1 / seconds,
            "tokens_per_second": gradient.real / seconds,
            "real_token_share": gradient.real / gradient.places,
            "trained_tokens": trained_tokens,
            "elapsed_seconds": elapsed_seconds,
            "micro_batch_size": micro_batch_size,
            **memory_bytes(),
        }
        self._journal.record(step, {**metrics, "time": time.time()})
        left = self._total_steps - step
        self._journal.say(
            StepCompleted(
                step=step,
                total_steps=self._total_steps,
                metrics=metrics,
                elapsed_seconds=elapsed_seconds,
                remaining_seconds=left * sum(self._seconds) / len(self._seconds),
            )
        )

    def tell_memory(self, step: int, model: nn.Module, update: Update, gradient: Gradient) -> None:
        """What they keep; once, after the first step."""
        if len(self._seconds) != 1:
            return
        trained = dict(tree_flatten(model.trainable_parameters()))
        frozen = [array for name, array in tree_flatten(model.parameters()) if name not in trained]
        held = {
            FROZEN: sum(array.nbytes for array in frozen),
            TRAINED: _bytes(update.parameters),
            GRADIENTS: _bytes(gradient.sums),
            OPTIMIZER: _bytes(update.optimizer.state),
        }
        self._journal.say(MemoryHeld(step=step, held_bytes={name: float(size) for name, size in held.items()}))


def _bytes(tree: Any) -> int:
    return sum(array.nbytes for _, array in tree_flatten(tree))
