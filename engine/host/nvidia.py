"""The memory of an NVIDIA GPU, if there is one: from its driver's own library, or else from nvidia-smi."""

from __future__ import annotations

import ctypes
import os
from typing import NamedTuple

from engine.host.programs import Programs

_LIBRARY = "libnvidia-ml.so.1"
_QUERY = "--query-gpu=memory.free,memory.total"


class GpuMemory(NamedTuple):
    """What is in use has the driver's own part with it, because nobody can have that."""

    used_bytes: int
    total_bytes: int


class _Memory(ctypes.Structure):
    """nvmlMemory_t (NVIDIA: NVML API reference, Device Queries)."""

    _fields_ = [("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong)]


class NvidiaMemory:
    """Of the first GPU that CUDA may use. The library comes with the driver, so that no package is needed for it."""

    def __init__(self, programs: Programs, library: str = _LIBRARY) -> None:
        self._programs = programs
        self._gpu = _first_visible()
        self._library: str | None = library
        self._nvml: ctypes.CDLL | None = None
        self._device = ctypes.c_void_p()

    def read(self) -> GpuMemory:
        """What all processes use of it, and what it has. Raises where there is none, or it does not say."""
        try:
            return self._ask_library()
        except (OSError, AttributeError):
            return self._ask_program()

    def _ask_library(self) -> GpuMemory:
        if self._library is not None:  # tried once, and here, because loading it takes a while
            library, self._library = self._library, None
            self._nvml, self._device = _open(library, self._gpu)
        if self._nvml is None:
            raise OSError("no NVML")
        memory = _Memory()
        _check(self._nvml.nvmlDeviceGetMemoryInfo(self._device, ctypes.byref(memory)))
        return GpuMemory(memory.total - memory.free, memory.total)

    def _ask_program(self) -> GpuMemory:
        answer = self._programs.answer("nvidia-smi", _QUERY, "--format=csv,noheader,nounits", f"--id={self._gpu}")
        free, total = (int(mebibytes) << 20 for mebibytes in answer.split(","))
        return GpuMemory(total - free, total)


def _first_visible() -> str:
    """The first of CUDA_VISIBLE_DEVICES: an index, or a name such as GPU-1b2c…; the first of all without it."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "").partition(",")[0].strip() or "0"


def _open(library: str, gpu: str) -> tuple[ctypes.CDLL, ctypes.c_void_p]:
    nvml, device = ctypes.CDLL(library), ctypes.c_void_p()
    _check(nvml.nvmlInit_v2())
    if gpu.isdecimal():
        _check(nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(int(gpu)), ctypes.byref(device)))
    else:
        _check(nvml.nvmlDeviceGetHandleByUUID(gpu.encode(), ctypes.byref(device)))
    return nvml, device


def _check(code: int) -> None:
    if code != 0:
        raise OSError(f"NVML says {code}")
