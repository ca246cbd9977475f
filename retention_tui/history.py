"""Histories of bounded size: what a chart needs of a run of any length.

A `Series` keeps at most `capacity` buckets of equal numbers of values; each has the least, the most and the mean of its
values and the mean of their smoothed course. When it is full, neighbours are merged. No spike is ever lost: the least
and the most of all buckets are those of all values. Smoothing comes before the reduction and does not change with it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

CAPACITY = 1024
SMOOTHING = 0.6
_BLOCK = 256


class Smoother:
    """Exponential moving average m ← βm + (1 − β)x, divided by 1 − βⁿ so that it starts at the first value.

    Values that are not finite leave it as it is.
    """

    def __init__(self, beta: float = SMOOTHING) -> None:
        self._beta = beta
        self._mean = 0.0
        self._weight = 0.0

    def add(self, value: float) -> float:
        """The average after `value`; NaN before the first finite one."""
        if math.isfinite(value):
            self._mean = self._beta * self._mean + (1 - self._beta) * value
            self._weight = self._beta * self._weight + (1 - self._beta)
        return self.value

    def add_many(self, values: Floats) -> Floats:
        """The average after each of `values`, of shape [n]; the same as `add` for each of them.

        Block by block as a product with the powers of β: a Python loop over a long history would hold back training.
        """
        finite = np.isfinite(values)
        known = values[finite]
        means, weights = np.empty(known.size), np.empty(known.size)
        power = self._beta ** np.arange(_BLOCK + 1)
        kernel = (1 - self._beta) * np.tril(power[np.abs(np.subtract.outer(np.arange(_BLOCK), np.arange(_BLOCK)))])
        for start in range(0, known.size, _BLOCK):
            block = known[start : start + _BLOCK]
            part, decay = kernel[: block.size, : block.size], power[1 : block.size + 1]
            means[start : start + _BLOCK] = part @ block + decay * self._mean
            weights[start : start + _BLOCK] = part.sum(axis=1) + decay * self._weight
            self._mean, self._weight = float(means[start + block.size - 1]), float(weights[start + block.size - 1])
        averages = np.concatenate([[math.nan], means / weights])
        return averages[np.cumsum(finite)]

    @property
    def value(self) -> float:
        return self._mean / self._weight if self._weight else math.nan


@dataclass(frozen=True, slots=True)
class Columns:
    """A series reduced to columns of equal width: arrays of shape [columns], NaN where a column has no value."""

    step: Floats
    low: Floats
    high: Floats
    mean: Floats
    smooth: Floats


class Series:
    """The history of one metric. Adding costs a few microseconds, now and then a merge of all buckets."""

    def __init__(self, *, capacity: int = CAPACITY, beta: float = SMOOTHING) -> None:
        if capacity < 2 or capacity % 2:
            raise ValueError(f"capacity = {capacity}: an even number of at least 2")
        self._capacity = capacity
        self._smoother = Smoother(beta)
        self._stride = 1  # values a bucket
        self._size = 0  # buckets in use
        self._first = np.zeros(capacity)
        self._last = np.zeros(capacity)
        self._low = np.zeros(capacity)
        self._high = np.zeros(capacity)
        self._sum = np.zeros(capacity)
        self._smooth_sum = np.zeros(capacity)
        self._count = np.zeros(capacity)  # finite values
        self._filled = 0  # values, finite or not, in the last bucket

    @classmethod
    def of(cls, steps: NDArray[np.int64], values: Floats, *, capacity: int = CAPACITY) -> Series:
        """The series of many values, as `add` would make it one by one; both of shape [n], steps rising."""
        series = cls(capacity=capacity)
        if not values.size:
            return series
        smooth = series._smoother.add_many(values)
        while -(-values.size // series._stride) > capacity:
            series._stride *= 2
        edges = np.arange(0, values.size, series._stride)
        series._size, series._filled = edges.size, values.size - int(edges[-1])
        used, finite = slice(0, edges.size), np.isfinite(values)
        series._first[used], series._last[used] = steps[edges], steps[np.append(edges[1:], values.size) - 1]
        series._low[used] = np.minimum.reduceat(np.where(finite, values, math.inf), edges)
        series._high[used] = np.maximum.reduceat(np.where(finite, values, -math.inf), edges)
        series._sum[used] = np.add.reduceat(np.where(finite, values, 0.0), edges)
        series._smooth_sum[used] = np.add.reduceat(np.where(finite, smooth, 0.0), edges)
        series._count[used] = np.add.reduceat(finite.astype(np.float64), edges)
        return series

    def __len__(self) -> int:
        """Buckets in use."""
        return self._size

    @property
    def last_step(self) -> float:
        """Step of the newest value; -inf if there is none."""
        return float(self._last[self._size - 1]) if self._size else -math.inf

    @property
    def first_step(self) -> float:
        """Step of the oldest value; inf if there is none."""
        return float(self._first[0]) if self._size else math.inf

    def least(self) -> tuple[float, float] | None:
        """Step and value of the least value (of its bucket's end, once buckets hold several); None without values."""
        known = np.flatnonzero(self._count[: self._size])
        if not known.size:
            return None
        bucket = known[np.argmin(self._low[known])]
        return float(self._last[bucket]), float(self._low[bucket])

    def newest(self) -> tuple[float, float] | None:
        """Step and value of the newest value (its bucket's mean, once buckets hold several); None without values."""
        known = np.flatnonzero(self._count[: self._size])
        if not known.size:
            return None
        bucket = known[-1]
        return float(self._last[bucket]), float(self._sum[bucket] / self._count[bucket])

    def add(self, step: float, value: float) -> None:
        """Adds the value of one step. A step that is not new takes the history back to it first."""
        if step <= self.last_step:
            self.forget_from(step)
        smooth = self._smoother.add(value)
        if self._size == 0 or self._filled >= self._stride:
            self._open_bucket(step)
        bucket = self._size - 1
        self._last[bucket] = step
        self._filled += 1
        if math.isfinite(value):
            self._low[bucket] = min(self._low[bucket], value)
            self._high[bucket] = max(self._high[bucket], value)
            self._sum[bucket] += value
            self._smooth_sum[bucket] += smooth
            self._count[bucket] += 1

    def forget_from(self, step: float) -> None:
        """Drops the buckets that reach `step` or beyond: a run that went back does these steps again."""
        self._size = int(np.searchsorted(self._last[: self._size], step, side="left"))
        self._filled = self._stride

    def columns(self, start: float, stop: float, count: int) -> Columns:
        """The series between two steps, reduced to `count` columns of equal width.

        A bucket belongs to the column of its middle; its spikes are in that column's low and high.
        """
        size = self._size
        empty = np.full(count, np.nan)
        if size == 0 or count <= 0 or stop <= start:
            return Columns(*(empty.copy() for _ in range(5)))
        middle = (self._first[:size] + self._last[:size]) / 2
        known = (self._count[:size] > 0) & (middle >= start) & (middle <= stop)
        column = np.minimum((middle[known] - start) / (stop - start) * count, count - 1).astype(np.intp)
        low, high = np.full(count, np.inf), np.full(count, -np.inf)
        np.minimum.at(low, column, self._low[:size][known])
        np.maximum.at(high, column, self._high[:size][known])
        number = self._count[:size][known]
        counts = np.bincount(column, number, count)
        with np.errstate(invalid="ignore"):
            step = np.bincount(column, middle[known] * number, count) / counts
            mean = np.bincount(column, self._sum[:size][known], count) / counts
            smooth = np.bincount(column, self._smooth_sum[:size][known], count) / counts
        low[counts == 0], high[counts == 0] = np.nan, np.nan
        return Columns(step, low, high, mean, smooth)

    def _open_bucket(self, step: float) -> None:
        if self._size == self._capacity:
            self._merge_neighbours()
        bucket = self._size
        self._first[bucket] = self._last[bucket] = step
        self._low[bucket], self._high[bucket] = math.inf, -math.inf
        self._sum[bucket] = self._smooth_sum[bucket] = self._count[bucket] = 0.0
        self._size, self._filled = bucket + 1, 0

    def _merge_neighbours(self) -> None:
        half = self._capacity // 2
        self._first[:half] = self._first[0::2]
        self._last[:half] = self._last[1::2]
        self._low[:half] = np.minimum(self._low[0::2], self._low[1::2])
        self._high[:half] = np.maximum(self._high[0::2], self._high[1::2])
        for sums in (self._sum, self._smooth_sum, self._count):
            sums[:half] = sums[0::2] + sums[1::2]
        self._size, self._stride = half, self._stride * 2
        self._filled = self._stride
