"""The folder of runs: making one, finding one, listing them, and the right to train one."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from engine.durable import sync_path, write_json
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


_TAKEN = {errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR}
DAMAGED = "damaged"
"""The state of a run whose files cannot be read."""
_NAME = re.compile(r"[^\s/\\\x00-\x1f.][^/\\\x00-\x1f]{0,99}")


def create_run(folder: Path, profile_name: str, identity: Mapping[str, Any], name: str | None = None) -> RunDirectory:
    """Makes the directory of a new run with its run.json: both, or neither.

    Without a name the run is called after its profile: PROFILE, PROFILE-2, PROFILE-3 …
    Raises `UserError` where the name is taken or cannot be a folder's name, or the folder cannot be written.
    """
    if name is not None and not _NAME.fullmatch(name):
        raise UserError(f"run name {name!r} cannot be used: no slash, no leading dot or space, at most 100 characters")
    number, new = 1, RunDirectory(folder / f".new-{os.getpid()}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        new.path.mkdir(exist_ok=True)
        while True:
            run = RunDirectory(folder / (name or (profile_name if number == 1 else f"{profile_name}-{number}")))
            if not run.identity_path.exists():
                head = {"format": RUN_FORMAT, "name": run.name, "profile_name": profile_name}
                write_json(new.identity_path, {**head, **identity})
                try:
                    new.path.rename(run.path)  # an empty folder that has the name is no obstacle
                    sync_path(folder)
                    return run
                except OSError as error:
                    if error.errno not in _TAKEN:
                        raise
            if name is not None:
                raise UserError(
                    f"run {name} exists already in {folder}; choose another --name, "
                    f"or go on with it: retention-tui resume {name}"
                )
            number += 1
    except OSError as error:
        raise UserError(f"runs folder {folder} cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(new.path, ignore_errors=True)


def remove_run(run: RunDirectory) -> None:
    """Deletes a run that has not begun. Its name is free at once: half a run never keeps it."""
    aside = run.path.with_name(f".removed-{run.name}")
    shutil.rmtree(aside, ignore_errors=True)
    with contextlib.suppress(OSError):
        run.path.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def find_run(folder: Path, name_or_path: str) -> RunDirectory:
    """A run given by name (in `folder`) or by path. Raises `UserError` naming what there is."""
    for path in (folder / name_or_path, Path(name_or_path)):
        if (path / "run.json").is_file():
            return RunDirectory(path.resolve())
    names = [summary.name for summary in list_runs(folder)]
    known = f"there are {', '.join(names[:8])}" if names else "there are no runs yet"
    raise UserError(f"run {name_or_path!r} is not in {folder}; {known}")


def list_runs(folder: Path) -> list[RunSummary]:
    """All runs of a folder, the most recently written first. One that cannot be read is listed as `DAMAGED`."""
    summaries = []
    for path in folder.glob("[!.]*"):
        run = RunDirectory(path)
        try:
            summaries.append(run.summary())
        except (UserError, KeyError, TypeError, ValueError, OSError):
            with contextlib.suppress(OSError):
                if run.identity_path.exists() or run.database_path.exists():
                    summaries.append(_damaged(run))
    return sorted(summaries, key=lambda summary: summary.updated, reverse=True)


def _damaged(run: RunDirectory) -> RunSummary:
    return RunSummary(
        name=run.name,
        path=run.path,
        kind="?",
        profile="?",
        state=DAMAGED,
        step=0,
        total_steps=0,
        loss=None,
        val_loss=None,
        updated=run.path.stat().st_mtime,
        live=run.is_live(),
    )
