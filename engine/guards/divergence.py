"""Stops a run whose loss or gradient is no number any more."""

from __future__ import annotations

import math
from enum import Enum


class Verdict(Enum):
    APPLY = "apply"
    SKIP = "skip"
    STOP = "stop"


class DivergenceGuard:
    """Never lets a step without a finite loss and gradient reach the weights; gives up after `limit` in a row."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.in_a_row = 0

    def judge(self, loss: float, grad_norm: float) -> Verdict:
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.in_a_row = 0
            return Verdict.APPLY
        self.in_a_row += 1
        return Verdict.STOP if self.in_a_row >= self.limit else Verdict.SKIP
