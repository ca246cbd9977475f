"""Tells when the machine itself becomes a danger to the run: swap that grows, battery, a closed lid, heat."""

from __future__ import annotations

from collections import deque

from engine.events import Alarm, Notice, Reading
from engine.profile import MemoryGuard

_SWAP_WINDOW_SECONDS = 60.0
_SWAP_GROWTH_BYTES = 10e6
_SWAP_OVER_SHARE = 0.8
_SETTLED_SECONDS = 15.0
"""How long a state lasts before it is believed: a plug that slips, heat at the edge."""
_LOW_BATTERY_PERCENT = 15.0


class MachineGuard:
    """Gives each alarm once, when its state has begun, and a notice when it has ended. Knows time only by readings."""

    def __init__(self, settings: MemoryGuard) -> None:
        self._swap = _GrowingSwap(settings.swap_mb * 1e6)
        self._battery, self._low, self._lid = _State(), _State(), _State()
        self._hot, self._critical = _State(), _State()

    def judge(self, reading: Reading) -> list[Alarm | Notice]:
        """What the owner should know after this reading; mostly nothing."""
        said = self._swap.judge(reading)
        now, charge = reading.time, reading.battery_percent
        on_battery = None if reading.on_mains is None else not reading.on_mains
        left = "" if charge is None else f" at {charge:.0f} %"
        low = None if on_battery is None or charge is None else on_battery and charge <= _LOW_BATTERY_PERCENT
        hot = None if reading.heat is None else reading.heat in ("serious", "critical")
        critical = None if reading.heat is None else reading.heat == "critical"
        for state, is_so, level, begins, ends in (
            (self._battery, on_battery, "warning", f"on battery{left}: plug the machine in", "on mains power again"),
            (self._low, low, "critical", f"battery{left}: the machine will soon switch off", "battery no longer low"),
            (self._lid, reading.lid_closed, "warning", "the lid is closed: the machine may sleep", "the lid is open"),
            (self._hot, hot, "warning", "the machine is hot and slows down: give it air", "the machine has cooled"),
            (self._critical, critical, "critical", "heat is critical: the machine may switch off", "heat not critical"),
        ):
            changed = state.changed(now, is_so)
            if changed:
                said.append(Alarm(time=now, level=level, text=begins))
            elif changed is not None:
                said.append(Notice(time=now, text=ends))
        return said


class _State:
    """Something that is or is not so, believed only after a while, and not changed by what is unknown."""

    def __init__(self) -> None:
        self._believed = False
        self._other_since: float | None = None

    def changed(self, now: float, is_so: bool | None) -> bool | None:
        """What is believed, if that has just changed."""
        if is_so is None or is_so == self._believed:
            self._other_since = None
            return None
        if self._other_since is None:
            self._other_since = now
        if now - self._other_since < _SETTLED_SECONDS:
            return None
        self._believed, self._other_since = is_so, None
        return is_so


class _GrowingSwap:
    """Swap above a limit that has grown over the last minute; said again each time it has doubled."""

    def __init__(self, limit_bytes: float) -> None:
        self._limit = limit_bytes
        self._minute: deque[tuple[float, int]] = deque()
        self._said_at_bytes: int | None = None

    def judge(self, reading: Reading) -> list[Alarm | Notice]:
        now, swap = reading.time, reading.swap_bytes
        if swap is None or not self._limit:
            return []
        self._minute.append((now, swap))
        while self._minute[0][0] < now - _SWAP_WINDOW_SECONDS:
            self._minute.popleft()
        growth = swap - self._minute[0][1]
        if swap > self._limit and growth >= _SWAP_GROWTH_BYTES and swap >= 2 * (self._said_at_bytes or 0):
            self._said_at_bytes = swap
            return [Alarm(time=now, level="warning", text=f"swap is at {_megabytes(swap)} and growing")]
        if self._said_at_bytes is not None and swap < _SWAP_OVER_SHARE * self._limit:
            self._said_at_bytes = None
            return [Notice(time=now, text=f"swap is down to {_megabytes(swap)}")]
        return []


def _megabytes(count: float) -> str:
    return f"{count / 1e6:,.0f} MB"
