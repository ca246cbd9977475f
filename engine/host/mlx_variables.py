"""The environment variables that change how MLX and Metal run; both read them when MLX is imported, or soon after."""

from __future__ import annotations

import os
import sys

from engine.profile import Host

WATCHDOG = "AGX_RELAX_CDM_CTXSTORE_TIMEOUT"
BUFFER_MB = "MLX_MAX_MB_PER_BUFFER"
_set_here: dict[str, str] = {}


def set_mlx_variables(host: Host) -> list[str]:
    """Sets what the profile asks for; call it before anything imports MLX.

    What the user has set stays as it is, and MLX that is there already keeps what it has read. Returns a line for each
    wish that is not granted; asked again with MLX there, it says the same, and nothing where all is as wished.
    """
    wishes = {WATCHDOG: "1"} if host.relax_metal_watchdog else {}
    if host.buffer_mb is not None:
        wishes[BUFFER_MB] = str(host.buffer_mb)
    refusals = []
    for name, value in wishes.items():
        present = os.environ.get(name)
        if present == value:
            continue
        if present is not None and present != _set_here.get(name):
            refusals.append(f"{name} stays {present}, as your environment says; the profile asks for {value}")
        elif "mlx.core" in sys.modules:
            refusals.append(f"{name}={value} comes too late: MLX is loaded already; start the run by its own command")
        else:
            os.environ[name] = _set_here[name] = value
    return refusals
