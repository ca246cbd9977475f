"""What a run's numbers depend on beside its profile: the same environment gives the same bits."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from engine import backend
from engine.cores import ranks_launched


def environment() -> dict[str, Any]:
    """Versions, machine, device, BLAS, threads and ranks, for run.json."""
    return {
        "versions": {name: _version(name) for name in ("retention-tui", "mlx", "mlx-lm", "numpy", "tokenizers")}
        | {"python": platform.python_version()},
        "machine": {
            "system": platform.platform(),
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "memory_bytes": psutil.virtual_memory().total,
        },
        "device": backend.device_words(),
        "blas": Path(backend.BLAS).name,
        "blas_threads": os.environ.get("OPENBLAS_NUM_THREADS"),
        "ranks": ranks_launched(),
    }


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What has changed and may change the last bits of a resumed run, in words."""
    pairs = [(name, then.get(name), now.get(name)) for name in ("device", "blas", "blas_threads")]
    pairs.append(("ranks", then.get("ranks", 1), now["ranks"]))
    pairs += [(name, then.get("versions", {}).get(name), now["versions"][name]) for name in ("mlx", "numpy")]
    pairs.append(("processor", then.get("machine", {}).get("processor"), now["machine"]["processor"]))
    return [f"{name} was {before}, is {after}" for name, before, after in pairs if before != after]


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
