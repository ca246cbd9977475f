"""What this machine has for a run."""

from __future__ import annotations

from dataclasses import dataclass

from engine.backend import compute_dtype, device_words, mx, on_gpu
from engine.cores import ranks_launched
from engine.events import Level
from engine.host import this_machine
from engine.host.mlx_variables import buffer_mb
from engine.host.signs import room
from engine.planning import Setting
from engine.profile import Profile

_METAL_BUFFER_MB = 50
"""MLX's own on Apple's larger chips, 40 on smaller ones; where there is CUDA, engine.host.mlx_variables sets one."""


@dataclass(frozen=True)
class Capacity:
    """Bytes that a process may use; None is unknown.

    `limit_bytes` is the machine's memory, or less in a control group; `available_bytes` what of it is free now.
    `device_bytes` is what a GPU should be given at most: Metal's recommended working set, or the GPU's own memory.
    `shared` is true where that is a part of the machine's memory.
    """

    limit_bytes: int | None
    available_bytes: int | None = None
    device_bytes: int | None = None
    shared: bool = True
    device: str = "cpu"

    @property
    def for_training_bytes(self) -> int | None:
        """The tightest of the limits that MLX's memory meets."""
        limits = [self.device_bytes] if not self.shared else [self.device_bytes, self.limit_bytes]
        return min((limit for limit in limits if limit), default=None)

    def judge(self, mlx_bytes: int, process_bytes: int) -> tuple[Level, str]:
        """Whether a process fits that needs so much, `mlx_bytes` of it MLX's own, and why not, in words."""
        levels = list[tuple[Level, str]]()
        if self.device_bytes:
            name = "what Metal recommends" if self.shared else "the GPU"
            levels.append(_judge(mlx_bytes, self.device_bytes, name))
        if self.limit_bytes and self.shared:
            levels.append(_judge(process_bytes, self.limit_bytes, "this machine"))
        if self.available_bytes is not None and self.shared and process_bytes > self.available_bytes:
            words = f"only {gigabytes(self.available_bytes)} are free now: close other programs"
            levels.append((Level.YELLOW, words))
        order = list(Level)
        return max(levels, key=lambda level: order.index(level[0]), default=(Level.GREEN, ""))


def this_capacity() -> Capacity:
    """Looks at this machine; takes milliseconds, or a second where a program has to be asked."""
    info = mx.device_info() if on_gpu() else {}
    recommended = info.get("max_recommended_working_set_size")
    ask = on_gpu() and recommended is None  # an NVIDIA GPU's memory may have to be asked of a program
    reading = this_machine(patient=ask).read()
    device = recommended or reading.gpu_limit_bytes or info.get("total_memory")
    return Capacity(
        limit_bytes=reading.limit_bytes,
        available_bytes=reading.available_bytes,
        device_bytes=int(device) if on_gpu() and device else None,
        shared=not on_gpu() or recommended is not None,
        device=device_words(),
    )


def this_setting(profile: Profile) -> Setting:
    """Where and in what dtype this machine would compute a profile's steps."""
    return Setting(
        gpu=on_gpu(),
        compute_bytes=compute_dtype(profile.train.dtype).size,
        ranks=ranks_launched(),
        buffer_mb=buffer_mb(profile.host) or _METAL_BUFFER_MB,
    )


def gigabytes(count: float) -> str:
    """`26.4 GB`, or `38 MB` below a tenth of one."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e8 else f"{count / 1e6:,.0f} MB"


def _judge(need: int, limit: int, name: str) -> tuple[Level, str]:
    if need > limit:
        return Level.RED, f"{name} has {gigabytes(limit)}"
    if room(name, limit, limit - need).level is not Level.GREEN:
        return Level.YELLOW, f"{name} has {gigabytes(limit)}: little is left for anything else"
    return Level.GREEN, f"{name} has {gigabytes(limit)}"
