"""The folder of runs: making one, finding one, listing them, and the right to train one."""

from __future__ import annotations

import contextlib
import fcntl
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from engine.durable import write_json
from engine.errors import UserError
from engine.store import RUN_FORMAT, RunDirectory, RunSummary


class RunLock:
    """The right to train in a run directory: an flock, so it ends with the process that holds it."""

    def __init__(self, run: RunDirectory) -> None:
        try:
            self._file: IO[bytes] = run.lock_path.open("ab")
        except OSError as error:
            raise UserError(f"{run.lock_path} cannot be written: {error.strerror or error}") from None
        deadline = time.monotonic() + 1.0
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:  # shorter: someone only looked whether the run is live
                    self._file.close()
                    raise UserError(
                        f"run {run.name} is being trained by another process; stop that one first"
                    ) from None
                time.sleep(0.02)

    def release(self) -> None:
        self._file.close()


_NAME = re.compile(r"[^\s/\\\x00-\x1f.][^/\\\x00-\x1f]{0,99}")


def create_run(folder: Path, profile_name: str, identity: Mapping[str, Any], name: str | None = None) -> RunDirectory:
    """Makes the directory of a new run and writes its run.json.

    Without a name the run is called after its profile: PROFILE, PROFILE-2, PROFILE-3 …
    Raises `UserError` where the name is taken or cannot be a folder's name, or the folder cannot be written.
    """
    if name is not None and not _NAME.fullmatch(name):
        raise UserError(f"run name {name!r} cannot be used: no slash, no leading dot or space, at most 100 characters")
    number = 1
    try:
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            candidate = name or (profile_name if number == 1 else f"{profile_name}-{number}")
            run = RunDirectory(folder / candidate)
            try:
                run.path.mkdir()
                break
            except FileExistsError:
                if name is not None:
                    raise UserError(
                        f"run {name} exists already in {folder}; choose another --name, "
                        f"or go on with it: retention-tui resume {name}"
                    ) from None
                number += 1
        head = {"format": RUN_FORMAT, "name": run.name, "profile_name": profile_name}
        write_json(run.identity_path, {**head, **identity})
    except OSError as error:
        raise UserError(f"runs folder {folder} cannot be written: {error.strerror or error}") from None
    return run


def find_run(folder: Path, name_or_path: str) -> RunDirectory:
    """A run given by name (in `folder`) or by path. Raises `UserError` naming what there is."""
    for path in (folder / name_or_path, Path(name_or_path)):
        if (path / "run.json").is_file():
            return RunDirectory(path.resolve())
    names = [summary.name for summary in list_runs(folder)]
    known = f"there are {', '.join(names[:8])}" if names else "there are no runs yet"
    raise UserError(f"run {name_or_path!r} is not in {folder}; {known}")


def list_runs(folder: Path) -> list[RunSummary]:
    """All readable runs of a folder, the most recently written first."""
    summaries = []
    for path in folder.iterdir() if folder.is_dir() else ():
        with contextlib.suppress(UserError, KeyError, TypeError, ValueError, OSError):
            summaries.append(RunDirectory(path).summary())
    return sorted(summaries, key=lambda summary: summary.updated, reverse=True)
