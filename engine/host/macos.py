"""A Mac, asked through sysctl, and through programs for what sysctl does not know."""

from __future__ import annotations

import ctypes
import re
import struct
from collections.abc import Callable
from functools import cache

import psutil

from engine.events import Level, Reading
from engine.host.programs import Programs
from engine.host.signs import known

_PRESSURE = "kern.memorystatus_vm_pressure_level"
_LEVELS = {1: Level.GREEN, 2: Level.YELLOW, 4: Level.RED}
_CAUSES = {Level.GREEN: "", Level.YELLOW: "macOS is short of memory", Level.RED: "macOS is out of memory"}
_SWAP = "vm.swapusage"
_SWAP_USAGE = struct.Struct("=QQQIi")
"""`xsw_usage`: total, available and used bytes, the page size, and whether it is encrypted (XNU: bsd/sys/sysctl.h)."""
_UNITS = {"B": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_HEAT = {0: "nominal", 1: "fair", 2: "serious", 3: "critical", 4: "critical"}
"""nominal, moderate, heavy, trapping, sleeping (OSThermalNotification.h), by their names in NSProcessInfo."""


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def sysctl_by_name(name: str, size: int) -> bytes:
    """A value of the kernel's, of at most `size` bytes. Raises `OSError` or `AttributeError` where it has none."""
    value, length = ctypes.create_string_buffer(size), ctypes.c_size_t(size)
    if _libc().sysctlbyname(name.encode(), value, ctypes.byref(length), None, ctypes.c_size_t(0)) != 0:
        raise OSError(ctypes.get_errno(), name)
    return value.raw[: length.value]


class MacMachine:
    """Reads a Mac. The level is the kernel's own, the one that Activity Monitor colours; nothing is added to it.

    `sysctl` may raise; then the program of that name is asked, as seldom as any program is.
    """

    def __init__(self, sysctl: Callable[[str, int], bytes] = sysctl_by_name, patient: bool = False) -> None:
        self._sysctl = sysctl
        self._programs = Programs(patient)

    def read(self) -> Reading:
        self._programs.turn()
        level = known(self._level)
        power = known(self._power)
        memory = known(psutil.virtual_memory)
        return Reading(
            level=level,
            cause=_CAUSES[level] if level else "",
            limit_bytes=memory.total if memory else None,
            available_bytes=memory.available if memory else None,
            swap_bytes=known(self._swap_bytes),
            process_bytes=known(lambda: psutil.Process().memory_info().rss),
            heat=known(self._heat),
            on_mains=power[0] if power else None,
            battery_percent=power[1] if power else None,
            lid_closed=known(self._lid_closed),
        )

    def _level(self) -> Level:
        try:
            number = int.from_bytes(self._sysctl(_PRESSURE, 4), "little")
        except (OSError, AttributeError):
            number = int(self._programs.answer("sysctl", "-n", _PRESSURE))
        return _LEVELS[number]

    def _swap_bytes(self) -> int:
        try:
            return int(_SWAP_USAGE.unpack(self._sysctl(_SWAP, _SWAP_USAGE.size))[2])
        except (OSError, AttributeError):
            answer = self._programs.answer("sysctl", "-n", _SWAP)
        # total = 2048.00M  used = 1042.25M  free = 1005.75M  (encrypted)
        used = re.search(r"used = ([\d.,]+)([BKMGT])", answer)
        if used is None:
            raise ValueError(answer)
        return round(float(used[1].replace(",", ".")) * _UNITS[used[2]])

    def _power(self) -> tuple[bool, float | None]:
        """Whether the mains feed it, and how full its battery is in percent, if it has one.

        Now drawing from 'Battery Power'
         -InternalBattery-0 (id=21823587)	85%; discharging; 3:10 remaining present: true
        """
        answer = self._programs.answer("pmset", "-g", "batt")
        source = re.search(r"drawing from '(AC|Battery|UPS) Power'", answer)
        if source is None:
            raise ValueError(answer)
        percent = re.search(r"InternalBattery.*?\t\s*(\d+)%", answer)
        return source[1] == "AC", float(percent[1]) if percent else None

    def _heat(self) -> str:
        answer = self._programs.answer("notifyutil", "-g", "com.apple.system.thermalpressurelevel")
        return _HEAT[int(answer.split()[-1])]  # com.apple.system.thermalpressurelevel 0

    def _lid_closed(self) -> bool:
        answer = self._programs.answer("ioreg", "-r", "-k", "AppleClamshellState", "-d", "1")
        state = re.search(r'"AppleClamshellState" = (Yes|No)', answer)
        if state is None:
            raise ValueError("no lid")
        return state[1] == "Yes"
