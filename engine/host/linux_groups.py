"""The memory of this process's control groups on Linux."""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from engine.control_groups import group_folders
from engine.events import Level
from engine.host.signs import Sign, known, room

_NO_LIMIT_BYTES = 1 << 60
"""Version 1 says 2⁶³, rounded down to a page, where there is no limit."""
_SPARE_CACHE_SHARE = 0.05
_EVENTS_COUNT_SECONDS = 10.0
"""As long as the kernel's own averages of stalls look back: a peak of a step is over before the next look."""


@dataclass(frozen=True)
class Group:
    """A control group with a limit, as it is now."""

    limit_bytes: int
    available_bytes: int
    swap_bytes: int | None
    cache_bytes: int
    met_limit: bool
    """In the last seconds it was at its limit, and something had to go before memory was given."""
    ran_out: bool
    """In the last seconds nothing could go: a process was killed, or is about to be."""

    def sign(self) -> Sign:
        """What it says of memory pressure."""
        if self.ran_out:
            return Sign(Level.RED, f"control group of {self.limit_bytes / 1e9:.1f} GB ran out of memory")
        # A group that reads files meets its limit all the time, and pays with cache. Without cache it was a peak.
        if self.met_limit and self.cache_bytes < _SPARE_CACHE_SHARE * self.limit_bytes:
            return Sign(Level.RED, f"control group met its limit of {self.limit_bytes / 1e9:.1f} GB")
        return room("control group", self.limit_bytes, self.available_bytes)


class _Counts(NamedTuple):
    """Events of a group since it was made."""

    met_limit: int
    ran_out: int


class _Risen:
    """Which counts have risen in the last `seconds`. What had happened before the first look is not news."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._counts: _Counts | None = None
        self._at = [float("-inf"), float("-inf")]

    def judge(self, counts: _Counts) -> tuple[bool, bool]:
        now = time.monotonic()
        for index, (count, before) in enumerate(zip(counts, self._counts or counts, strict=True)):
            if count > before:
                self._at[index] = now
        self._counts = counts
        met_limit, ran_out = (now - at <= self._seconds for at in self._at)
        return met_limit, ran_out


class MemoryGroups:
    """Reads the groups that this process is in, of version 1 or 2, whichever has the memory controller.

    Each look asks anew which they are, because a process can be moved. `root` is where /proc and /sys are.
    """

    def __init__(self, root: Path, events_count_seconds: float = _EVENTS_COUNT_SECONDS) -> None:
        self._root = root
        self._risen: defaultdict[Path, _Risen] = defaultdict(lambda: _Risen(events_count_seconds))

    def read(self) -> list[Group]:
        """The groups with a limit: its own first, then those around it."""
        groups = []
        for folder in self._folders():
            group = known(lambda folder=folder: self._group(folder))  # type: ignore[misc]
            if group is not None:
                groups.append(group)
        return groups

    def pressure_file(self) -> Path:
        """Where version 2 says how long the tasks of its own group waited for memory. `OSError` without one."""
        for folder in self._folders():
            if (folder / "memory.current").exists():  # the root of all groups has none, and says what the machine says
                return folder / "memory.pressure"
        raise FileNotFoundError("memory.pressure")

    def _folders(self) -> list[Path]:
        return [folder for folders in group_folders("memory", self._root) for folder in folders]

    def _group(self, folder: Path) -> Group | None:
        version_2 = (folder / "memory.max").exists()
        limit = _limit_of_version_2(folder) if version_2 else int((folder / "memory.limit_in_bytes").read_text())
        if limit is None or limit >= _NO_LIMIT_BYTES:
            return None
        used = int((folder / ("memory.current" if version_2 else "memory.usage_in_bytes")).read_text())
        statistics = _table(folder / "memory.stat")
        total = "" if version_2 else "total_"  # version 1 tells a group's own pages from those of all below it
        inactive, active = statistics[f"{total}inactive_file"], statistics.get(f"{total}active_file", 0)
        if version_2:
            swap = known(lambda: int((folder / "memory.swap.current").read_text()))
        else:
            swap = statistics.get("total_swap")
        counts = known(lambda: _counts_of_version_2(folder) if version_2 else _counts_of_version_1(folder))
        met_limit, ran_out = self._risen[folder].judge(counts) if counts else (False, False)
        return Group(
            limit_bytes=limit,
            # The kernel gives the inactive cache back first, and keeps the active one at about the same size.
            available_bytes=min(limit, max(0, limit - used + inactive + active // 2)),
            swap_bytes=swap,
            cache_bytes=inactive + active,
            met_limit=met_limit,
            ran_out=ran_out,
        )


def _limit_of_version_2(folder: Path) -> int | None:
    """The hard limit, or the one above which the kernel slows a group down, whichever is met first."""
    limits = [(folder / name).read_text().strip() for name in ("memory.max", "memory.high") if (folder / name).exists()]
    return min([int(limit) for limit in limits if limit != "max"], default=None)


def _counts_of_version_2(folder: Path) -> _Counts:
    events = _table(folder / "memory.events")
    return _Counts(events["max"] + events.get("high", 0), events.get("oom", 0) + events.get("oom_kill", 0))


def _counts_of_version_1(folder: Path) -> _Counts:
    events = known(lambda: _table(folder / "memory.oom_control")) or {}
    return _Counts(int((folder / "memory.failcnt").read_text()), events.get("oom_kill", 0) + events.get("under_oom", 0))


def _table(file: Path) -> dict[str, int]:
    """A file of lines of a name and a number."""
    return {name: int(number) for name, number in (line.split() for line in file.read_text().splitlines())}
