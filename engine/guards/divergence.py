"""Keeps steps that are no good away from the weights: no number at all, or far outside of what was usual."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np

from engine.profile import DivergenceGuard as Settings

_LEAST_SPREAD = 1e-3
"""Of the mean: a loss that hardly moves would make every step a spike."""


class Verdict(IntEnum):
    """What becomes of a step."""

    APPLY = 0
    SKIP = 1
    GO_BACK = 2
    STOP = 3


@dataclass(frozen=True, slots=True)
class Judgement:
    """A verdict, and in words why it is not `APPLY`."""

    verdict: Verdict
    reason: str = ""


class DivergenceGuard:
    """Judges each step before it is applied, by the good steps before it.

    A bad step is skipped, and never counts as usual; after `skips` in a row the run goes back to a good checkpoint,
    `rollbacks` times in all; then it stops. Batches are shuffled, so that steps in a row are not bad for their text.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._losses: deque[float] = deque(maxlen=settings.window_steps)
        self._norms: deque[float] = deque(maxlen=settings.window_steps)
        self.in_a_row = 0
        """Bad steps since the last good one."""

    def judge(self, loss: float, grad_norm: float, rollbacks: int) -> Judgement:
        """`loss` in nats a token, `grad_norm` before clipping; `rollbacks` is how often the run has gone back."""
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        if reason := self._spike(loss, grad_norm) if finite else f"loss {loss}, grad norm {grad_norm}":
            self.in_a_row += 1
            if self.in_a_row <= self._settings.skips:
                return Judgement(Verdict.SKIP, reason)
            return Judgement(Verdict.GO_BACK if rollbacks < self._settings.rollbacks else Verdict.STOP, reason)
        self._losses.append(loss)
        self._norms.append(grad_norm)
        self.in_a_row = 0
        return Judgement(Verdict.APPLY)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {"in_a_row": self.in_a_row, "losses": list(self._losses), "grad_norms": list(self._norms)}

    def restore(self, state: dict[str, Any]) -> None:
        """Takes what `state` gave; what is missing (an older release's) begins anew."""
        self.in_a_row = int(state.get("in_a_row", 0))
        for window, name in ((self._losses, "losses"), (self._norms, "grad_norms")):
            window.clear()
            window.extend(state.get(name, ()))

    def _spike(self, loss: float, grad_norm: float) -> str:
        if len(self._losses) < self._settings.window_steps // 4:
            return ""
        if sigma := self._settings.loss_sigma:
            mean = float(np.mean(self._losses))
            spread = max(float(np.std(self._losses)), _LEAST_SPREAD * abs(mean))
            if loss > mean + sigma * spread and spread > 0:
                return f"loss {loss:.3f} is {(loss - mean) / spread:.1f} standard deviations over the last steps' mean"
        usual = float(np.median(self._norms))
        if (factor := self._settings.grad_norm_factor) and usual > 0 and grad_norm > factor * usual:
            return f"grad norm {grad_norm:.3g} is {grad_norm / usual:.0f} times that of the last steps"
        return ""
