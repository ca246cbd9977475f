"""What the doctor finds about the machine under a run: memory and its limits, power, heat, lid, sleep."""

from __future__ import annotations

import os
import sys

import psutil

from engine.events import Level, Reading
from engine.finding import Finding
from engine.host import Machine, this_machine
from engine.host.awake import Awake
from engine.host.mlx_variables import BUFFER_MB, WATCHDOG

_LITTLE_MEMORY_BYTES = 1e9
_MUCH_SWAP_BYTES = 500e6
_FIRMWARE_SAYS_NOTHING = "unknown: nothing here tells"


def host_findings(machine: Machine | None = None, platform: str = sys.platform) -> list[Finding]:
    """Looks at `machine`, this one if None; waits for the programs that it asks. `platform` is as in `sys.platform`."""
    reading = (machine or this_machine(patient=True)).read()
    findings = [_memory(reading), _pressure(reading), _swap(reading)]
    if reading.gpu_bytes is not None and reading.gpu_limit_bytes is not None:
        used, limit = _gigabytes(reading.gpu_bytes), _gigabytes(reading.gpu_limit_bytes)
        findings.append(Finding("gpu memory", f"{limit}, {used} of it in use"))
    return [*findings, _power(reading, platform), _heat(reading), _lid(reading), _sleep(platform), _variables()]


def _memory(reading: Reading) -> Finding:
    limit, available = reading.limit_bytes, reading.available_bytes
    if limit is None or available is None:
        return Finding("memory", "unknown")
    value = f"{_gigabytes(limit)}, {_gigabytes(available)} of it available"
    whole = psutil.virtual_memory().total
    if limit < whole:
        value = f"{_gigabytes(limit)} by the limit of its control group ({_gigabytes(whole)} in the machine), "
        value += f"{_gigabytes(available)} available"
    if available < _LITTLE_MEMORY_BYTES:
        advice = "raise the limit before training" if limit < whole else "close what else is open before training"
        return Finding("memory", value, "warning", advice)
    return Finding("memory", value)


def _pressure(reading: Reading) -> Finding:
    if reading.level is None:
        return Finding("memory pressure", "unknown: no run will be guarded by it", "warning")
    if reading.level is Level.GREEN:
        return Finding("memory pressure", "green")
    advice = "close what else is open before training"
    return Finding("memory pressure", f"{reading.level}: {reading.cause}", "warning", advice)


def _swap(reading: Reading) -> Finding:
    if reading.swap_bytes is None:
        return Finding("swap", "unknown")
    value = f"{_gigabytes(reading.swap_bytes)} in use"
    if reading.swap_bytes > _MUCH_SWAP_BYTES:
        return Finding("swap", value, "warning", "what is swapped out is slow; close what else is open before training")
    return Finding("swap", value)


def _power(reading: Reading, platform: str) -> Finding:
    battery = "" if reading.battery_percent is None else f", battery at {reading.battery_percent:.0f} %"
    if reading.on_mains is None:
        return Finding("power", _FIRMWARE_SAYS_NOTHING + battery)
    if reading.on_mains:
        return Finding("power", f"mains{battery}")
    advice = "plug it in before a long run"
    if platform == "darwin":
        advice += ": caffeinate -s, which keeps it awake, works on mains power only"
    return Finding("power", f"not on mains{battery}", "warning", advice)


def _heat(reading: Reading) -> Finding:
    if reading.heat in ("serious", "critical"):
        return Finding("heat", reading.heat, "warning", "it slows down when hot: give it air")
    return Finding("heat", reading.heat or _FIRMWARE_SAYS_NOTHING)


def _lid(reading: Reading) -> Finding:
    if reading.lid_closed is None:
        return Finding("lid", _FIRMWARE_SAYS_NOTHING)
    if reading.lid_closed:
        advice = "leave it open: a closed machine sleeps, unless a display and the mains are plugged in"
        return Finding("lid", "closed", "warning", advice)
    return Finding("lid", "open")


def _sleep(platform: str) -> Finding:
    """Tries for a moment what a run does for as long as it lasts."""
    awake = Awake(platform=platform)
    said = awake.start()
    held = awake.held
    awake.stop()
    if held:
        return Finding("sleep", said)
    advice = "see to it in the system's power settings that it does not sleep while it trains"
    if platform != "darwin" and "there is no" in said:
        advice = f"install systemd with its logind, or {advice}"
    return Finding("sleep", said, "warning", advice)


def _variables() -> Finding:
    present = [f"{name}={os.environ[name]}" for name in (BUFFER_MB, WATCHDOG) if name in os.environ]
    return Finding(
        "mlx variables", ", ".join(present) or f"{BUFFER_MB} and {WATCHDOG} are not set; [host] may set them"
    )


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:,.1f} GB"
