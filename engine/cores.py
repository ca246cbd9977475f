"""How many cores this process may use: what it is pinned to, its container's quota, and the ranks beside it."""

from __future__ import annotations

import json
import math
import os
import sys
from contextlib import suppress
from pathlib import Path

from engine.control_groups import group_folders


def usable_cores() -> int:
    """The cores that this process may keep busy, at least 1; ranks on one machine share them."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    if (quota := quota_cores()) is not None:
        cores = min(cores, quota)
    return max(1, cores // ranks_here())


def quota_cores(root: Path = Path("/")) -> int | None:
    """The cores that the control group's CPU quota allows, rounded up; None without a quota.

    A quota binds a group and all below it, so the smallest on the way up counts (Linux: Documentation/admin-guide/
    cgroup-v2.rst, `cpu.max`; scheduler/sched-bwc.rst for version 1). `root` is where /proc and /sys are.
    """
    quotas: list[float] = []
    for folders in group_folders("cpu", root):
        for folder in folders:
            with suppress(OSError, ValueError, ZeroDivisionError):
                quotas += _quota(folder)
    return max(1, math.ceil(min(quotas))) if quotas else None


def _quota(folder: Path) -> list[float]:
    """A group's own quota in cores, if it has one."""
    if (limit := folder / "cpu.max").exists():
        quota, period = limit.read_text().split()
    elif (limit := folder / "cpu.cfs_quota_us").exists():
        quota, period = limit.read_text().strip(), (folder / "cpu.cfs_period_us").read_text()
    else:
        return []
    return [] if quota in ("max", "-1") else [int(quota) / int(period)]


def ranks_launched() -> int:
    """How many processes `mlx.launch` started for this run; 1 without it."""
    size = os.environ.get("MLX_WORLD_SIZE", "")
    return int(size) if size.isdecimal() and int(size) else max(1, len(_rank_hosts()))


def ranks_here() -> int:
    """How many of them run on this machine, with this one."""
    hosts, rank = _rank_hosts(), os.environ.get("MLX_RANK", "")
    return hosts.count(hosts[int(rank)]) if rank.isdecimal() and int(rank) < len(hosts) else 1


def _rank_hosts() -> list[str]:
    """Each rank's host, as the ring backend's host file lists them: [["10.0.0.1:5000", …], …]."""
    try:
        hosts = json.loads(Path(os.environ["MLX_HOSTFILE"]).read_text())
        return [str(addresses[0]).rpartition(":")[0] for addresses in hosts]
    except (KeyError, OSError, ValueError, TypeError, IndexError):
        return []
