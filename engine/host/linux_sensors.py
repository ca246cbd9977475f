"""Power, lid and heat of a Linux machine. Each look raises where the machine has no such thing or does not say."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_BATTERY_STATES = ("Charging", "Discharging", "Not charging", "Full")
_MILLIDEGREES_THAT_CAN_BE = range(1, 200_000)
_HEAT_BELOW_CRITICAL = ((5_000, "critical"), (10_000, "serious"), (20_000, "fair"))
"""Millidegrees below the temperature at which the kernel switches the machine off."""


class Sensors:
    """`root` is where /proc and /sys are."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def power(self) -> tuple[bool | None, float | None]:
        """Whether the mains feed it, and how full its battery is, in percent (Linux: ABI/testing/sysfs-class-power)."""
        plugged: list[bool] = []
        discharging: list[bool] = []
        percent: float | None = None
        for supply in sorted((self._root / "sys/class/power_supply").iterdir()):
            with suppress(OSError, ValueError):
                if _word(supply / "type") != "Battery":
                    plugged.append(int(_word(supply / "online")) > 0)
                elif not _of_a_device(supply):
                    with suppress(OSError, ValueError):
                        capacity = float(_word(supply / "capacity"))
                        percent = capacity if percent is None and 0 <= capacity <= 100 else percent
                    status = _word(supply / "status")
                    if status in _BATTERY_STATES:
                        discharging.append(status == "Discharging")
        if any(plugged):
            return True, percent
        if any(discharging):
            return False, percent
        return (False if plugged else True if discharging else None), percent

    def lid_closed(self) -> bool:
        for file in sorted((self._root / "proc/acpi/button/lid").glob("*/state")):
            state = file.read_text().rpartition(":")[2].strip()  # state:      open
            if state in ("open", "closed"):
                return state == "closed"
        raise FileNotFoundError("no lid")

    def heat(self) -> str:
        """As macOS names it, by the zone that is nearest to its critical temperature, of those that have one."""
        margin = min(self._margins())
        return next((name for limit, name in _HEAT_BELOW_CRITICAL if margin <= limit), "nominal")

    def _margins(self) -> Iterator[int]:
        for zone in (self._root / "sys/class/thermal").glob("thermal_zone*"):
            for kind in zone.glob("trip_point_*_type"):
                with suppress(OSError, ValueError):
                    if _word(kind) == "critical":
                        critical = int(_word(kind.with_name(kind.name.replace("_type", "_temp"))))
                        now = int(_word(zone / "temp"))
                        if critical in _MILLIDEGREES_THAT_CAN_BE and now in _MILLIDEGREES_THAT_CAN_BE:
                            yield critical - now


def _word(file: Path) -> str:
    return file.read_text().strip()


def _of_a_device(supply: Path) -> bool:
    """Whether it feeds a mouse or the like, and not the machine."""
    with suppress(OSError, ValueError):
        return _word(supply / "scope") == "Device"
    return False
