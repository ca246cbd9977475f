"""A Linux machine, read from /proc and /sys."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from engine.events import Level, Reading
from engine.host.linux_groups import Group, MemoryGroups
from engine.host.linux_sensors import Sensors
from engine.host.nvidia import NvidiaMemory
from engine.host.programs import Programs
from engine.host.signs import Sign, known, room, worst

_STALLED_SOME_PERCENT, _STALLED_ALL_PERCENT = 10.0, 10.0
_AMPLE_SHARE = 0.25
_SENSORS_EVERY_SECONDS = 10.0


class _Memory(NamedTuple):
    total_bytes: int
    available_bytes: int
    swap_bytes: int | None


class Stall(NamedTuple):
    """Pressure stall information: in how much of the last ten seconds some task, or all of them, waited for memory."""

    some_percent: float
    all_percent: float


class LinuxMachine:
    """Reads the machine, and this process's control groups on it. `root` is where /proc and /sys are.

    What makes the level, the worst sign counting:

    - the room left in the machine and in each control group with a limit (`engine.host.signs.room`);
    - a group that has run out of memory in the last seconds, or has met its limit and has no cache to blame: red;
    - stalls (PSI): some task waiting for memory 10 % of the time is yellow, all of them 10 % is red. The machine's
      count only where less than a quarter of it is available: else somebody fights with a limit of their own, or comes
      back from swap, and neither is helped by what we give up. Its own group's always count.
    """

    def __init__(self, root: Path = Path("/"), patient: bool = False) -> None:
        self._root = root
        self._groups = MemoryGroups(root)
        self._sensors = Sensors(root)
        self._programs = Programs(patient)
        self._gpu = NvidiaMemory(self._programs)
        self._sensed_at = float("-inf")
        self._power: tuple[bool | None, float | None] = (None, None)
        self._lid: bool | None = None
        self._heat: str | None = None

    def read(self) -> Reading:
        self._programs.turn()
        memory = known(self._memory)
        groups = known(self._groups.read) or []
        stall = known(lambda: read_stall(self._root / "proc/pressure/memory"))
        own_stall = known(lambda: read_stall(self._groups.pressure_file()))
        sign = worst(_signs(memory, groups, stall, own_stall))
        self._sense_now_and_then()
        gpu = known(self._gpu.read)
        rooms = [(group.limit_bytes, group.available_bytes) for group in groups]
        swaps = [group.swap_bytes for group in groups if group.swap_bytes is not None]
        if memory is not None:
            rooms.append((memory.total_bytes, memory.available_bytes))
            swaps += [memory.swap_bytes] if memory.swap_bytes is not None else []
        stalls = [each.some_percent for each in (stall, own_stall) if each is not None]
        return Reading(
            level=sign.level if sign else None,
            cause=sign.cause if sign else "",
            limit_bytes=min((limit for limit, _ in rooms), default=None),
            available_bytes=min((available for _, available in rooms), default=None),
            swap_bytes=next(iter(swaps), None),  # a group's own, where it has a limit: the machine's is not its doing
            stalled_percent=max(stalls, default=None),
            gpu_bytes=gpu.used_bytes if gpu else None,
            gpu_limit_bytes=gpu.total_bytes if gpu else None,
            process_bytes=known(self._process_bytes),
            heat=self._heat,
            on_mains=self._power[0],
            battery_percent=self._power[1],
            lid_closed=self._lid,
        )

    def _memory(self) -> _Memory:
        sizes: dict[str, int] = {}
        for line in (self._root / "proc/meminfo").read_text().splitlines():  # MemTotal:       24682416 kB
            name, _, size = line.partition(":")
            if name in ("MemTotal", "MemAvailable", "SwapTotal", "SwapFree"):
                sizes[name] = int(size.split()[0]) * 1024
        swap = sizes["SwapTotal"] - sizes["SwapFree"] if {"SwapTotal", "SwapFree"} <= sizes.keys() else None
        return _Memory(sizes["MemTotal"], sizes["MemAvailable"], swap)

    def _process_bytes(self) -> int:
        resident_pages = (self._root / "proc/self/statm").read_text().split()[1]
        return int(resident_pages) * os.sysconf("SC_PAGE_SIZE")

    def _sense_now_and_then(self) -> None:
        # Some of these files ask the firmware, which takes milliseconds; none of them changes fast.
        if time.monotonic() < self._sensed_at + _SENSORS_EVERY_SECONDS:
            return
        self._sensed_at = time.monotonic()
        self._power = known(self._sensors.power) or (None, None)
        self._lid = known(self._sensors.lid_closed)
        self._heat = known(self._sensors.heat)


def read_stall(file: Path) -> Stall:
    """A file in the format of /proc/pressure/memory (Linux: Documentation/accounting/psi.rst)."""
    averages = {}
    for line in file.read_text().splitlines():  # some avg10=0.00 avg60=0.00 avg300=0.00 total=0
        kind, average, *_ = line.split()
        averages[kind] = float(average.removeprefix("avg10="))
    return Stall(averages["some"], averages["full"])


def _signs(memory: _Memory | None, groups: list[Group], stall: Stall | None, own_stall: Stall | None) -> Iterator[Sign]:
    if memory is not None:
        yield room("memory", memory.total_bytes, memory.available_bytes)
    for group in groups:
        yield group.sign()
    if own_stall is not None:
        yield _stalled("tasks of the control group", own_stall)
    ample = memory is not None and memory.available_bytes >= _AMPLE_SHARE * memory.total_bytes
    if stall is not None and not ample:
        yield _stalled("tasks", stall)


def _stalled(who: str, stall: Stall) -> Sign:
    if stall.all_percent > _STALLED_ALL_PERCENT:
        return Sign(Level.RED, f"all {who} waited for memory {stall.all_percent:.0f} % of the time")
    if stall.some_percent > _STALLED_SOME_PERCENT:
        return Sign(Level.YELLOW, f"{who} waited for memory {stall.some_percent:.0f} % of the time")
    return Sign(Level.GREEN)
