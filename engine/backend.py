"""The one door to MLX: loads a fast BLAS first where one is needed, then MLX itself.

Everything in the engine takes `mx` from here, so that no import order can leave MLX on the reference BLAS that its
Linux CPU wheel brings (about 6 instead of 160 GFLOP/s on two cores).
"""

from __future__ import annotations

import ctypes
import ctypes.util
import importlib.util
import os
import sys
from pathlib import Path
from typing import cast

import psutil

from engine.cores import usable_cores
from engine.host.mlx_variables import set_default_buffer

REFERENCE_BLAS = "reference"
ACCELERATE = "Accelerate"


def load_fast_blas() -> str:
    """Loads an optimised BLAS globally, so that MLX's calls bind to it; must run before MLX is imported.

    A system OpenBLAS wins over the one that pip brought (`scipy-openblas32`). Returns its path, `Accelerate` on macOS,
    or `reference` where none was found.
    """
    if sys.platform != "linux":
        return ACCELERATE
    for candidate in _openblas_candidates():
        try:
            library = ctypes.CDLL(candidate, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        if hasattr(library, "cblas_sgemm"):
            return candidate
    return REFERENCE_BLAS


def _openblas_candidates() -> list[str]:
    system = ctypes.util.find_library("openblas")
    candidates = [system] if system else []
    spec = importlib.util.find_spec("scipy_openblas32")
    if spec and spec.origin:
        candidates += sorted(str(path) for path in Path(spec.origin).parent.joinpath("lib").glob("lib*openblas*.so*"))
    return candidates


def _limit_threads() -> None:
    # OpenBLAS reads the variable when it is loaded; more threads than cores only wait for each other.
    if sys.platform == "linux":
        os.environ.setdefault("OPENBLAS_NUM_THREADS", str(usable_cores()))


_limit_threads()
set_default_buffer()
BLAS = load_fast_blas()

import mlx.core as mx  # noqa: E402

__all__ = ["BLAS", "REFERENCE_BLAS", "mx"]


def on_gpu() -> bool:
    """True where MLX computes on a GPU (Metal or CUDA)."""
    return bool(mx.default_device().type == mx.gpu)


def device_words() -> str:
    """The device in a word or two: `cpu`, or the GPU's name."""
    if not on_gpu():
        return "cpu"
    return str(mx.device_info().get("device_name", "gpu"))


def compute_dtype(name: str) -> mx.Dtype:
    """The dtype that a profile's `train.dtype` means on this machine. `auto`: float32 on CPU, bfloat16 on GPU."""
    if name == "auto":
        return mx.bfloat16 if on_gpu() else mx.float32
    return mx.bfloat16 if name == "bfloat16" else mx.float32


def scalar(array: mx.array) -> float:
    """The value of an array of one element; waits for it."""
    return float(cast(float, array.item()))


_OUT_OF_MEMORY = (
    "[metal::malloc]",
    "insufficient memory",  # [METAL] Command buffer execution failed: Insufficient Memory (…ErrorOutOfMemory)
    "outofmemory",
    "out of memory",  # cudaMallocAsync(…) failed: out of memory
    "unable to allocate",
    "memoryallocation",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory is used up. MLX has no type for it, only words, which differ by backend."""
    words = str(error).lower()
    return isinstance(error, MemoryError) or any(sign in words for sign in _OUT_OF_MEMORY)


def clear_cache() -> int:
    """Gives back what MLX keeps for later; how many bytes that were."""
    kept = mx.get_cache_memory()
    mx.clear_cache()
    return max(0, kept - mx.get_cache_memory())


_own_limit_bytes: list[int] = []


def limit_memory(limit_bytes: int | None) -> None:
    """What MLX may hold, its cache included; None for its own limit.

    Beyond it it first empties the cache; it never waits or fails for it.
    """
    if limit_bytes is not None:
        before = mx.set_memory_limit(limit_bytes)
        if not _own_limit_bytes:
            _own_limit_bytes.append(before)
    elif _own_limit_bytes:
        mx.set_memory_limit(_own_limit_bytes.pop())


def forget_peak() -> None:
    """The peak is counted anew: it is the process's, and another run may have been here before."""
    mx.reset_peak_memory()


def memory_bytes() -> dict[str, float]:
    """MLX's active, peak and cache memory and this process's own, as metrics. The peak does not contain the cache."""
    return {
        "active_memory_bytes": mx.get_active_memory(),
        "peak_memory_bytes": mx.get_peak_memory(),
        "cache_memory_bytes": mx.get_cache_memory(),
        "process_memory_bytes": psutil.Process().memory_info().rss,
    }
