"""Sees when the held-out loss has had enough: no better for long, or worse while the training loss falls."""

from __future__ import annotations

import math
from typing import Any

from engine.errors import ExitCode
from engine.events import State
from engine.guards import Action, End, Warn
from engine.outcome import Outcome
from engine.profile import EarlyStopping as Settings

_RISES = 3
"""So many in a row are overfitting."""


class EarlyStopping:
    """Judges each validation. The best checkpoint is kept whatever this guard says."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._best = math.inf
        self._best_step = self._without = self._rises = 0
        self._before: tuple[float, float] | None = None
        self._warned = False

    def judge(self, step: int, val_loss: float, train_loss: float) -> list[Action]:
        """`train_loss` is the mean since the validation before; both in nats a token."""
        actions: list[Action] = []
        if val_loss < self._best - (self._settings.least_improvement if math.isfinite(self._best) else 0):
            self._best, self._best_step, self._without, self._warned = val_loss, step, 0, False
        else:
            self._without += 1
        actions += self._overfitting(val_loss, train_loss)
        if self._settings.patience and self._without >= self._settings.patience:
            reason = (
                f"held-out loss has not become better in {self._without} validations; "
                f"the best was {self._best:.3f} at step {self._best_step:,}"
            )
            actions.append(End(Outcome(State.STOPPED, reason, ExitCode.OK)))
        return actions

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        best = self._best if math.isfinite(self._best) else None
        return {
            "best": best,
            "best_step": self._best_step,
            "without": self._without,
            "rises": self._rises,
            "before": self._before,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Takes what `state` gave; what is missing begins anew."""
        best, before = state.get("best"), state.get("before")
        self._best = math.inf if best is None else float(best)
        self._best_step, self._without = int(state.get("best_step", 0)), int(state.get("without", 0))
        self._rises = int(state.get("rises", 0))
        self._before = None if before is None else (float(before[0]), float(before[1]))

    def _overfitting(self, val_loss: float, train_loss: float) -> list[Action]:
        before, self._before = self._before, (val_loss, train_loss)
        if not math.isfinite(val_loss) or not math.isfinite(train_loss):
            self._before = None
        if before is None or self._settings.on_overfitting == "off":
            return []
        self._rises = self._rises + 1 if val_loss > before[0] and train_loss < before[1] else 0
        if self._rises < _RISES:
            return []
        reason = f"overfitting: held-out loss has risen {self._rises} times in a row while the training loss fell"
        if self._settings.on_overfitting == "stop":
            return [End(Outcome(State.STOPPED, reason, ExitCode.OK))]
        if self._warned:
            return []
        self._warned = True
        return [Warn("overfitting", f"{reason}; the best checkpoint is that of step {self._best_step:,}")]
