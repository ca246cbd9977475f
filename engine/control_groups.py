"""Where this process stands among Linux's control groups, of version 1, version 2, or both at once."""

from __future__ import annotations

from pathlib import Path


def group_folders(controller: str, root: Path = Path("/")) -> list[list[Path]]:
    """In each hierarchy that may hold `controller` (`cpu`, `memory`): this process's group and all around it.

    The innermost comes first, the folder that is mounted last. A limit binds a group and all below it, so each of them
    counts (Linux: Documentation/admin-guide/cgroup-v2.rst, cgroup-v1/). In a container the group's path may be the
    host's, so that only the mount itself exists; folders are named here whether they exist or not. `root` is where
    /proc and /sys are. Empty where there are no groups.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except (OSError, ValueError):
        return []
    chains = []
    for line in lines:  # 0::/user.slice or 4:cpu,cpuacct:/docker/1f0c
        _, _, rest = line.partition(":")
        controllers, colon, group = rest.partition(":")
        if colon and (not controllers or controller in controllers.split(",")):
            mount = root / "sys/fs/cgroup" / controllers
            own = mount / group.strip("/")
            chains.append([own, *(folder for folder in own.parents if folder.is_relative_to(mount))])
    return chains
