"""Writing that survives a crash: whole or not at all, and on the medium when it is said to be."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from pathlib import Path
from typing import Any


def write_json(path: Path, value: Any) -> None:
    """Writes JSON whole or not at all: to a neighbour, synced, then renamed. One writer at a time.

    What a killed writer left of the neighbour is overwritten by the next.
    """
    neighbour = path.with_name(f".{path.name}.new")
    try:
        with neighbour.open("w", encoding="utf-8") as file:
            json.dump(value, file, indent=2, ensure_ascii=False)
            file.write("\n")
            file.flush()
            sync(file.fileno())
        neighbour.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            neighbour.unlink(missing_ok=True)
        raise
    sync_path(path.parent)


def sync(descriptor: int) -> None:
    """Waits until a file or folder is on the medium. On macOS a plain fsync ends at the drive's cache."""
    if (full := getattr(fcntl, "F_FULLFSYNC", None)) is not None:
        with contextlib.suppress(OSError):  # not every file system has it
            fcntl.fcntl(descriptor, full)
            return
    os.fsync(descriptor)


def sync_path(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on the medium."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)
