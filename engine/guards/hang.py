"""Sees a run that does nothing any more: a kernel that never ends, a disk that does not answer."""

from __future__ import annotations

import threading
import time
from collections import deque
from statistics import median

from engine.guards import Tell, Warn

_FEWEST_STEPS = 3


class HangGuard:
    """`beat` is called by the trainer at every sign of life, `judge` by another thread, which a hang does not stop.

    Silences below `least_seconds` are nothing: a checkpoint, a busy disk. The clock stands still while the machine
    sleeps.
    """

    def __init__(self, factor: float, least_seconds: float) -> None:
        self._factor, self._least_seconds = factor, least_seconds
        self._steps: deque[float] = deque(maxlen=101)
        self._lock = threading.Lock()
        self._beat: float | None = None
        self._silent_since: float | None = None

    def beat(self, step_seconds: float | None = None, now: float | None = None) -> None:
        """Something was done; `step_seconds` where that completed a step."""
        with self._lock:
            self._beat = time.monotonic() if now is None else now
            if step_seconds is not None:
                self._steps.append(step_seconds)

    def rest(self) -> None:
        """Nothing is to be done until the next beat."""
        with self._lock:
            self._beat = None

    def judge(self, now: float | None = None) -> Warn | Tell | None:
        """Warns once when the silence has become too long, and tells when it has ended."""
        now = time.monotonic() if now is None else now
        with self._lock:
            beat, steps = self._beat, list(self._steps)
            if self._silent_since is not None:
                if beat is not None and beat <= self._silent_since:
                    return None
                silence, self._silent_since = now - self._silent_since, None
                return Tell(f"it goes on, after {silence:.0f} s without progress")
            if beat is None or not self._factor or len(steps) < _FEWEST_STEPS:
                return None
            usual = median(steps)
            if now - beat < max(self._factor * usual, self._least_seconds):
                return None
            self._silent_since = beat
        return Warn("hang", f"no progress for {now - beat:.0f} s, where a step takes {usual:.2g} s", critical=True)
