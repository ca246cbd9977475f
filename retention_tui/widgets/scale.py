"""Where the values of a chart lie on its axes: limits that move seldom, and round numbers to label."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from retention_tui.history import Floats


@dataclass(frozen=True, slots=True)
class Scale:
    """A linear or logarithmic axis from `low` to `high`."""

    low: float
    high: float
    log: bool = False

    def place(self, values: Floats) -> Floats:
        """Values as parts of the axis: 0 at `low`, 1 at `high`; NaN where a logarithm has no place for them."""
        if not self.log:
            return (values - self.low) / (self.high - self.low)
        with np.errstate(invalid="ignore", divide="ignore"):
            logs = np.where(values > 0, np.log(values), np.nan)
        return (logs - math.log(self.low)) / (math.log(self.high) - math.log(self.low))

    def ticks(self, count: int) -> list[float]:
        """At most about `count` round values inside the axis."""
        if self.log and self.high / self.low > 8:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for factors in ((1, 2, 5), (1, 3), (1,)):
                found = [factor * 10.0**power for power in powers for factor in factors]
                found = [value for value in found if self.low <= value <= self.high]
                if len(found) <= count:
                    return found
            return found[:: math.ceil(len(found) / max(count, 1))]
        step = round_step((self.high - self.low) / max(count, 1))
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [index * step for index in range(first, last + 1)]


def round_step(distance: float) -> float:
    """The next of 1, 2, 2.5 and 5 times a power of ten."""
    magnitude = 10.0 ** math.floor(math.log10(distance))
    return next(factor * magnitude for factor in (1, 2, 2.5, 5, 10) if factor * magnitude >= distance * (1 - 1e-9))


def fit(low: float, high: float, *, log: bool = False, from_zero: bool = False) -> Scale:
    """An axis around finite values, its ends on round numbers."""
    if log and low > 0:
        exponent = math.floor(math.log10(low))
        grain = 10.0 ** (exponent - 1) * (2 if high / low < 3 else 5)
        return Scale(max(math.floor(low / grain) * grain, low / 2), math.ceil(high * 1.02 / grain) * grain, True)
    if from_zero:
        low = min(0.0, low)
    if high - low < 1e-9 * max(abs(high), abs(low)) or high == low:
        high, low = high + max(abs(high) * 0.1, 1e-9), low - (0.0 if from_zero else max(abs(low) * 0.1, 1e-9))
    grain = round_step((high - low) / 10)
    return Scale(math.floor(low / grain) * grain, math.ceil((high + (high - low) * 0.02) / grain) * grain)


def plain_label(value: float, distance: float) -> str:
    """As many decimals as tell one label from the next, which is `distance` away."""
    if abs(value) >= 10_000:
        return f"{value / 1000:,.0f} k" if distance >= 1000 else f"{value:,.0f}"
    decimals = max(0, math.ceil(-math.log10(distance) - 1e-9)) if distance < 1 else 0
    if abs(distance * 10**decimals % 1 - 0.5) < 1e-6:  # a step of 2.5 or 0.25 needs one more
        decimals += 1
    return f"{value:,.{min(decimals, 6)}f}" if decimals <= 4 else f"{value:.0e}"


def step_label(value: float, distance: float) -> str:
    """A step: `1,200`, or `1.2 M` for very long runs."""
    return f"{value / 1e6:g} M" if distance >= 100_000 else f"{value:,.0f}"
