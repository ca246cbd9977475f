"""Ends a run at a time of day, or after so many hours."""

from __future__ import annotations

from datetime import datetime, timedelta

from engine.errors import ExitCode
from engine.events import State
from engine.guards import End
from engine.outcome import Outcome


class TimeLimits:
    """`stop_at` is local time, its next occurrence from `now`; `max_hours` count from `began`.

    All moments are in seconds since the epoch.
    """

    def __init__(self, stop_at: str | None, max_hours: float | None, began: float, now: float) -> None:
        self._ends: list[tuple[float, str]] = []
        if stop_at is not None:
            self._ends.append((next_occurrence(stop_at, now), f"it is {stop_at} (guard.stop_at)"))
        if max_hours is not None:
            self._ends.append((began + 3600 * max_hours, f"{max_hours:g} h have passed (guard.max_hours)"))

    @property
    def moment(self) -> float | None:
        """When the run will be ended, if it is."""
        return min(self._ends)[0] if self._ends else None

    def judge(self, now: float) -> End | None:
        due = [end for end in self._ends if now >= end[0]]
        return End(Outcome(State.STOPPED, min(due)[1], ExitCode.OK)) if due else None


def next_occurrence(clock: str, after: float) -> float:
    """The next moment at which local clocks show `HH:MM`, in seconds since the epoch."""
    hour, minute = (int(part) for part in clock.split(":"))
    then = datetime.fromtimestamp(after)
    moment = then.replace(hour=hour, minute=minute, second=0, microsecond=0)
    if moment <= then:
        moment += timedelta(days=1)  # of the local calendar: a day may have 23 or 25 hours
    return moment.timestamp()
