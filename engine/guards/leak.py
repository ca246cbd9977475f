"""Sees memory that is never given back."""

from __future__ import annotations

import math
from collections import deque

import numpy as np

from engine.events import Reading
from engine.guards import Warn

_WINDOW_SECONDS = 300.0
_FEWEST_WINDOWS = 12
"""An hour: a run that settles in, or validates now and then, is no leak."""
_MOST_WINDOWS = 72
_LEAST_SHARE = 0.02
"""Of its memory, what a process must have gained in all that time."""


class LeakGuard:
    """Watches the floor of the process's memory: the least of every five minutes, over up to six hours.

    Warns where that floor rises steadily, so that it meets the limit within `hours`; again only when half of the time
    that it named has passed.
    """

    def __init__(self, hours: float) -> None:
        self._hours = hours
        self._floors: deque[tuple[float, float]] = deque(maxlen=_MOST_WINDOWS)  # (when, bytes) of whole windows
        self._began = self._least = math.nan
        self._quiet_until = 0.0

    def judge(self, reading: Reading) -> Warn | None:
        if reading.process_bytes is None or not self._hours:
            return None
        if math.isnan(self._began) or reading.time < self._began:
            self._began, self._least = reading.time, reading.process_bytes
        if reading.time - self._began < _WINDOW_SECONDS:
            self._least = min(self._least, reading.process_bytes)
            return None
        self._floors.append((self._began, self._least))
        self._began, self._least = reading.time, reading.process_bytes
        return self._warning(reading)

    def _warning(self, reading: Reading) -> Warn | None:
        if len(self._floors) < _FEWEST_WINDOWS or reading.available_bytes is None:
            return None
        times, floors = (np.array(values) for values in zip(*self._floors, strict=True))
        third, half = len(floors) // 3, len(floors) // 2
        slope = min(_slope(times, floors), _slope(times[half:], floors[half:]))  # what has settled is no leak
        rises = floors[-third:].min() > floors[:third].max() * (1 + _LEAST_SHARE)
        if slope <= 0 or not rises or reading.time < self._quiet_until:
            return None
        seconds = reading.available_bytes / slope
        if seconds > self._hours * 3600:
            return None
        self._quiet_until = reading.time + seconds / 2
        return Warn(
            "leak",
            f"the memory of this process grows by {slope * 3600 / 1e6:,.0f} MB an hour and would meet the limit in "
            f"{seconds / 3600:.1f} h",
        )


def _slope(x: np.ndarray, y: np.ndarray) -> float:
    """The median of the slopes between all pairs of points (Theil-Sen): single jumps do not bend it."""
    first, second = np.triu_indices(len(x), k=1)
    return float(np.median((y[second] - y[first]) / (x[second] - x[first])))
