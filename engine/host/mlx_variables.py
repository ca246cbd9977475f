"""The environment variables that change how MLX and Metal run; both read them when MLX is imported, or soon after."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from engine.profile import Host

WATCHDOG = "AGX_RELAX_CDM_CTXSTORE_TIMEOUT"
BUFFER_MB = "MLX_MAX_MB_PER_BUFFER"
_NVIDIA = Path("/dev/nvidiactl")
_CUDA_BUFFER_MB = "64"
"""MLX's own on CUDA is larger, and a buffer keeps what its kernels have used until all are done: measured on an H200,
a step of retention-small peaks at 34 instead of 52 GB, with gradient checkpointing at 6 instead of 23, as fast.
"""
_OURS = "RETENTION_TUI_SET"
"""Names what was set here, so that a process started from this one does not take it for its user's wish."""


def set_mlx_variables(host: Host) -> list[str]:
    """Sets what the profile asks for; call it before anything imports MLX.

    What the user has set stays as it is, and MLX that is there already keeps what it has read. Returns a line for each
    wish that is not granted; asked again with MLX there, it says the same, and nothing where all is as wished.
    """
    wishes = {
        WATCHDOG: "1" if host.relax_metal_watchdog else None,
        BUFFER_MB: None if host.buffer_mb is None else str(host.buffer_mb),
    }
    refusals = []
    for name, wish in wishes.items():
        present = os.environ.get(name)
        ours = f"{name}={present}" in os.environ.get(_OURS, "").split()
        if present == wish or (wish is None and not ours):
            continue
        if present is not None and not ours:
            refusals.append(f"{name} stays {present}, as your environment says; the profile asks for {wish}")
        elif "mlx.core" not in sys.modules:
            _set(name, wish)
        elif wish is not None:
            refusals.append(f"{name}={wish} comes too late: MLX is loaded already; start the run by its own command")
    return refusals


def set_default_buffer(driver: Path = _NVIDIA) -> None:
    """Sets smaller command buffers where there is an NVIDIA GPU and nobody has set any; for who imports MLX."""
    if BUFFER_MB not in os.environ and driver.exists():
        _set(BUFFER_MB, _CUDA_BUFFER_MB)


def buffer_mb(host: Host) -> int | None:
    """What MLX_MAX_MB_PER_BUFFER is in a process that takes a profile's wishes; None is MLX's own."""
    present = os.environ.get(BUFFER_MB, "")
    ours = f"{BUFFER_MB}={present}" in os.environ.get(_OURS, "").split()
    if host.buffer_mb is not None and (ours or not present):
        return host.buffer_mb
    return int(present) if present.isdecimal() else None


def _set(name: str, value: str | None) -> None:
    ours = [entry for entry in os.environ.get(_OURS, "").split() if not entry.startswith(f"{name}=")]
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value
        ours.append(f"{name}={value}")
    os.environ[_OURS] = " ".join(ours)
