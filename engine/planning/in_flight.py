"""What a GPU has in flight: the memory that command buffers hold which are queued or under way.

MLX takes an array's memory when its kernel is queued, and gives back what a command buffer's kernels have used when all
of them are done. It closes a buffer when its kernels read more than MLX_MAX_MB_PER_BUFFER × 2^20 numbers: numbers, not
bytes, in spite of its name (`array.data_size()` in MLX's device.cpp, 0.32). It waits when ten are queued. So what is in
flight grows with that variable, up to all that a step makes.
"""

from __future__ import annotations

import math

from engine.planning import Setting

BUFFERS = 12
"""The ten that MLX lets wait (MAX_ACTIVE_TASKS), the one beyond which it waits, and the one that is being filled."""

_BYTES_A_NUMBER = 1.43
"""What layers and optimizer have used up or made ahead in them for each number read; measured, H200, MLX 0.32."""


def buffer_numbers(setting: Setting) -> int:
    """Numbers that the kernels of a buffer have read when it is closed; MLX compares whole 2^20."""
    return (setting.buffer_mb + 1) << 20


def in_flight_bytes(setting: Setting) -> float:
    """The most that layers or the optimizer have in flight; 0 on a CPU, which has no such buffers."""
    return _BYTES_A_NUMBER * BUFFERS * buffer_numbers(setting) if setting.gpu else 0.0


def arrays_read(numbers: float, setting: Setting) -> int:
    """How often arrays of so many numbers are read in all buffers in flight: a buffer ends with a whole one."""
    return BUFFERS * math.ceil(buffer_numbers(setting) / numbers)
