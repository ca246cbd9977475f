"""What this machine has for a run."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from engine.backend import compute_dtype, device_words, mx, on_gpu
from engine.cores import ranks_here, ranks_launched
from engine.events import Level
from engine.host import this_machine
from engine.host.mlx_variables import buffer_mb
from engine.host.signs import room
from engine.planning import Setting
from engine.profile import Profile

_METAL_BUFFER_MB = 50
"""MLX's own on Apple's larger chips, 40 on smaller ones; where there is CUDA, engine.host.mlx_variables sets one."""


@dataclass(frozen=True)
class Bound:
    """A need against a limit."""

    need_bytes: int
    limit_bytes: int
    words: str
    """What sets it, with its size."""

    @property
    def level(self) -> Level:
        if self.need_bytes > self.limit_bytes:
            return Level.RED
        left = room(self.words, self.limit_bytes, self.limit_bytes - self.need_bytes)
        return Level.GREEN if left.level is Level.GREEN else Level.YELLOW


@dataclass(frozen=True)
class Capacity:
    """Bytes that a process may use; None is unknown.

    `limit_bytes` is the machine's memory, or less in a control group; `available_bytes` what of it is free now.
    `device_bytes` is what a GPU should be given at most: Metal's recommended working set, or the GPU's own memory.
    `shared` is true where that is a part of the machine's memory. `processes` of a run share it all, each with a
    need of its own. `mlx_limit_bytes` is what one of them may give MLX (guard.memory.limit_gb).
    """

    limit_bytes: int | None
    available_bytes: int | None = None
    device_bytes: int | None = None
    shared: bool = True
    device: str = "cpu"
    processes: int = 1
    mlx_limit_bytes: int | None = None

    def bounds(self, mlx_bytes: int, process_bytes: int) -> list[Bound]:
        """What processes meet that need so much each, `mlx_bytes` of it MLX's own; the tightest first."""
        found = list[Bound]()
        if self.device_bytes:
            size = gigabytes(self.device_bytes)
            words = f"what Metal recommends is {size}" if self.shared else f"the GPU has {size}"
            found.append(Bound(self.processes * mlx_bytes, self.device_bytes, words))
        if self.limit_bytes and self.shared:
            words = f"this machine has {gigabytes(self.limit_bytes)}"
            found.append(Bound(self.processes * process_bytes, self.limit_bytes, words))
        if self.mlx_limit_bytes is not None:
            allowed = f"guard.memory.limit_gb allows {gigabytes(self.mlx_limit_bytes)}"
            found.append(Bound(mlx_bytes, self.mlx_limit_bytes, f"{allowed} for MLX's {gigabytes(mlx_bytes)}"))
        return sorted(found, key=lambda bound: bound.need_bytes / max(1, bound.limit_bytes), reverse=True)

    def judge(self, mlx_bytes: int, process_bytes: int) -> tuple[Level | None, str]:
        """Whether processes fit that need so much each, and why not, in words; None where that cannot be known."""
        levels = list[tuple[Level, str]]()
        for bound in self.bounds(mlx_bytes, process_bytes):
            little = ": little is left" if bound.level is Level.YELLOW else ""
            levels.append((bound.level, bound.words + little))
        free = self.available_bytes if self.shared else None
        if free is not None and self.processes * process_bytes > free:
            levels.append((Level.YELLOW, f"only {gigabytes(free)} are free now: close other programs"))
        order = list(Level)
        worst = max(levels, key=lambda level: order.index(level[0]), default=None)
        if worst is not None and (worst[0] is not Level.GREEN or self._is_known):
            return worst
        return (Level.GREEN, f"{gigabytes(free)} are free") if free is not None else (None, "")

    @property
    def _is_known(self) -> bool:
        """Whether anything is known of what the machine itself has."""
        return bool(self.device_bytes or (self.limit_bytes and self.shared))


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
        processes=ranks_here(),
    )


def this_setting(profile: Profile) -> Setting:
    """Where and in what dtype this machine would compute a profile's steps."""
    return Setting(
        gpu=on_gpu(),
        compute_bytes=compute_dtype(profile.train.dtype).size,
        ranks=ranks_launched(),
        buffer_mb=buffer_mb(profile.host) or _METAL_BUFFER_MB,
        metal=on_gpu() and sys.platform == "darwin",
    )


def gigabytes(count: float) -> str:
    """`26.4 GB`, or `38 MB` below a tenth of one."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e8 else f"{count / 1e6:,.0f} MB"
