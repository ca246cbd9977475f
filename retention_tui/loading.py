"""How far a run is that cannot train yet, how fast that goes, and when it will be done."""

from __future__ import annotations

from collections import deque

from engine.events import LoadingProgress
from retention_tui import wording

_WINDOW_SECONDS = 20.0


class LoadingPace:
    """Folds what is told of one thing after the other; the pace is that of the last seconds."""

    def __init__(self) -> None:
        self._newest: LoadingProgress | None = None
        self._window: deque[LoadingProgress] = deque()

    def take(self, event: LoadingProgress) -> None:
        """Takes the next event."""
        newest = self._newest
        if newest is None or event.what != newest.what or event.done < newest.done:
            self._window.clear()
        self._newest = event
        self._window.append(event)
        while event.time - self._window[0].time > _WINDOW_SECONDS and len(self._window) > 2:
            self._window.popleft()

    @property
    def what(self) -> str:
        """What it is at, in words; empty before anything was told."""
        return wording.printable(" ".join(self._newest.what.split())) if self._newest else ""

    @property
    def fraction(self) -> float | None:
        """Done, from 0 to 1; None where nobody knows of how much."""
        newest = self._newest
        return min(1.0, newest.done / newest.total) if newest and newest.total else None

    @property
    def amount(self) -> str:
        """`1.21 of 3.09 GB`, or `120 of 400 steps`; empty where nothing is counted."""
        newest = self._newest
        if newest is None or not newest.unit:
            return ""
        if newest.unit == "bytes":
            total = wording.size(newest.total or newest.done)
            scale = {"GB": 1e9, "MB": 1e6}.get(total[-2:], 1e3)
            done = f"{newest.done / scale:.{2 if scale == 1e9 else 0}f}"
            return f"{done} of {total}" if newest.total is not None else total
        of = f" of {newest.total:,.0f}" if newest.total is not None else ""
        return f"{newest.done:,.0f}{of} {newest.unit}"

    @property
    def rate(self) -> str:
        """`42 MB/s`; empty before that is known."""
        rate, newest = self._per_second, self._newest
        if rate is None or newest is None or not newest.unit:
            return ""
        said = wording.size(rate) if newest.unit == "bytes" else f"{wording.number(rate, 2)} {newest.unit}"
        return f"{said}/s"

    @property
    def seconds_left(self) -> float | None:
        rate, newest = self._per_second, self._newest
        if not rate or newest is None or newest.total is None:
            return None
        return max(0.0, newest.total - newest.done) / rate

    @property
    def _per_second(self) -> float | None:
        if len(self._window) < 2:
            return None
        first, last = self._window[0], self._window[-1]
        seconds = last.time - first.time
        return (last.done - first.done) / seconds if seconds > 0 and last.done > first.done else None
