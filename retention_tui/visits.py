"""When somebody last looked at the runs of a folder: what came later happened while they were away.

Kept in the platform's state folder, by the folder of runs; one that cannot be written costs a report, and no run.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import platformdirs

from engine.durable import write_json

_FIRST_LOOK_SECONDS = 86400.0
"""Who was never here before is told of the last day."""


def state_folder() -> Path:
    """Where the app keeps what it remembers: `$RETENTION_TUI_STATE`, or the platform's state folder."""
    override = os.environ.get("RETENTION_TUI_STATE")
    return Path(override) if override else platformdirs.user_state_path("retention-tui")


def last_look(runs_folder: Path, run: str | None = None) -> float:
    """When the folder, or this run of it, was last looked at, in seconds since the epoch."""
    seen = _read().get(str(runs_folder.resolve()), {})
    folder = _moment(seen.get("folder"), time.time() - _FIRST_LOOK_SECONDS)
    return max(folder, _moment(seen.get("runs", {}).get(run), 0.0)) if run else folder


def remember_look(runs_folder: Path, run: str | None = None, moment: float | None = None) -> None:
    """The folder, or this run of it, has been looked at until now, or until a moment."""
    key, moment = str(runs_folder.resolve()), time.time() if moment is None else moment
    with contextlib.suppress(OSError), _alone():
        seen = _load()
        entry = seen.setdefault(key, {})
        if run is None:
            runs = {name: other for name, other in entry.get("runs", {}).items() if _moment(other, 0.0) > moment}
            seen[key] = {"folder": moment, "runs": runs}
        else:
            entry.setdefault("runs", {})[run] = moment
        write_json(_path(), seen)


def _path() -> Path:
    return state_folder() / "visits.json"


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """One app at a time changes the file. Raises `OSError` where nothing can be written there."""
    state_folder().mkdir(parents=True, exist_ok=True)
    with (state_folder() / "visits.lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _read() -> dict[str, dict[str, Any]]:
    try:
        return _load()
    except OSError:
        return {}


def _load() -> dict[str, dict[str, Any]]:
    """The whole file, but for what is damaged in it. Raises `OSError` where it is there and cannot be read: it may be
    readable the next time."""
    try:
        seen = json.loads(_path().read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    folders = seen.items() if isinstance(seen, dict) else ()
    return {
        folder: entry
        for folder, entry in folders
        if isinstance(entry, dict) and isinstance(entry.get("runs", {}), dict)
    }


def _moment(value: Any, otherwise: float) -> float:
    return float(value) if isinstance(value, int | float) else otherwise
