"""Checkpoints: whole or absent, verified before they are trusted, pruned except the best.

checkpoints/step-0000500/       later attempts: step-0000500.a2
    …                           the task's own files: a folder that can be used elsewhere as it is
    optimizer.safetensors       the optimizer's state
    state.json                  step, progress, score, and a checksum for each other file and for itself

Whatever has a checkpoint's name is whole: it is written, and deleted, under a name with a dot.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.backend import mx
from engine.durable import sync_path, write_json
from engine.errors import UserError
from engine.store import RunDirectory

_LITTLE_BYTES = 1e9
CHECKPOINT_FORMAT = 2
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.json"
_FOLDER = re.compile(r"step-(\d{7,})(?:\.a(\d+))?")
_WRITING, _DELETING = ".writing-", ".deleting-"


class CheckpointError(Exception):
    """A checkpoint could not be written (a full disk, a read-only folder). The ones before it are untouched."""


@dataclass(frozen=True, order=True)
class Checkpoint:
    """A checkpoint's place: what it was saved after."""

    step: int
    attempt: int
    path: Path

    def state(self) -> dict[str, Any]:
        """state.json. Raises `UserError` where it is missing, damaged or from a newer release."""
        try:
            state: dict[str, Any] = json.loads((self.path / STATE_FILE).read_text(encoding="utf-8"))
            version, checksum = int(state["format"]), state.pop("checksum", None)
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise UserError(f"checkpoint {self.path.name} is damaged: {STATE_FILE} cannot be read ({reason})") from None
        if version > CHECKPOINT_FORMAT:
            raise UserError(f"checkpoint {self.path.name} has format {version}; this release reads {CHECKPOINT_FORMAT}")
        if checksum != _checksum(state) and not (version == 1 and checksum is None):  # format 1 had none
            raise UserError(f"checkpoint {self.path.name} is damaged: {STATE_FILE} does not have its checksum")
        return state

    def verify(self) -> dict[str, Any]:
        """state.json, after every file was found to have the checksum written there; else `UserError`."""
        state = self.state()
        for name, expected in state["files"].items():
            try:
                actual = _sha256(self.path / name)
            except OSError as error:
                raise UserError(f"checkpoint {self.path.name} is damaged: {name}: {error.strerror}") from None
            if actual != expected:
                raise UserError(f"checkpoint {self.path.name} is damaged: {name} does not have its checksum")
        return state

    def optimizer_state(self) -> dict[str, mx.array]:
        """The optimizer's state as flat names and arrays."""
        arrays = mx.load(str(self.path / OPTIMIZER_FILE))
        assert isinstance(arrays, dict)
        return arrays

    def note(self, **entries: Any) -> None:
        """Changes entries of state.json, atomically. Raises `CheckpointError` where it could not be written."""
        try:
            state = self.state()
            if state != state | entries:
                _write_state(self.path, state | entries)
        except (OSError, UserError) as error:
            raise CheckpointError(f"{self.path.name}/{STATE_FILE} could not be written: {error}") from error

    def size_bytes(self) -> int:
        """What it takes on disk; 0 where it has vanished."""
        try:
            return sum(file.stat().st_size for file in self.path.iterdir())
        except OSError:
            return 0


def save_checkpoint(
    run: RunDirectory,
    step: int,
    attempt: int,
    write_model: Callable[[Path], None],
    optimizer_state: Mapping[str, mx.array],
    state: Mapping[str, Any],
) -> Checkpoint:
    """Writes a checkpoint into a temporary folder, syncs it and renames it, so that it is whole or absent.

    Raises `CheckpointError` where it could not be written, or is not known to be on the medium.
    """
    name = f"step-{step:07d}" + (f".a{attempt}" if attempt > 1 else "")
    final, temporary = run.checkpoints_path / name, run.checkpoints_path / f"{_WRITING}{name}"
    try:
        run.checkpoints_path.mkdir(exist_ok=True)
        _remove_leftovers(run)  # first: they may be what fills the disk
        temporary.mkdir()
        write_model(temporary)
        mx.save_safetensors(str(temporary / OPTIMIZER_FILE), dict(optimizer_state))
        files = sorted(path for path in temporary.iterdir())
        for path in files:
            sync_path(path)
        checksums = {path.name: _sha256(path) for path in files}
        head = {"format": CHECKPOINT_FORMAT, "step": step, "attempt": attempt}
        _write_state(temporary, {**head, **state, "files": checksums})
        if _holds(final, checksums):  # it was written before, but the sync below had failed
            (temporary / STATE_FILE).replace(final / STATE_FILE)
            sync_path(final)
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            _put_aside(final)
            temporary.rename(final)
        sync_path(run.checkpoints_path)
        sync_path(run.path)
    except (OSError, RuntimeError) as error:  # MLX reports a failed write as RuntimeError
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        reason += _little_room(run.path)
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(f"checkpoint of step {step} could not be written: {reason}") from error
    return Checkpoint(step, attempt, final)


def _little_room(folder: Path) -> str:
    """Says how full the disk is, where that may be why."""
    with contextlib.suppress(OSError):
        free = shutil.disk_usage(folder).free
        if free < _LITTLE_BYTES:
            return f" (the disk has {free / 1e6:.0f} MB left)"
    return ""


def list_checkpoints(run: RunDirectory) -> list[Checkpoint]:
    """The checkpoints on the run's current line, oldest first, without those that a later attempt left behind.

    An attempt whose row in the store was lost, or is not yet written, counts by its folders' numbers. Raises
    `UserError` where the store cannot be read.
    """
    begun = [(attempt.id, attempt.from_step) for attempt in run.attempts()]
    newest: dict[int, Checkpoint] = {}
    for checkpoint in sorted(_folders(run)):  # of one step, the newest attempt's comes last
        if all(checkpoint.step <= from_step for attempt, from_step in begun if attempt > checkpoint.attempt):
            newest[checkpoint.step] = checkpoint
    return list(newest.values())


def newest_attempt(run: RunDirectory) -> int:
    """The highest number of an attempt that left a checkpoint; 0 where there is none."""
    return max((checkpoint.attempt for checkpoint in _folders(run)), default=0)


def _folders(run: RunDirectory) -> list[Checkpoint]:
    try:
        folders = list(run.checkpoints_path.iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{run.checkpoints_path} cannot be read: {error.strerror or error}") from None
    named = ((_FOLDER.fullmatch(path.name), path) for path in folders)
    return [Checkpoint(int(match[1]), int(match[2] or 1), path) for match, path in named if match]


def latest_intact(run: RunDirectory, checkpoints: Sequence[Checkpoint], report: Callable[[str], None]) -> Checkpoint:
    """The newest checkpoint that passes `verify`; each damaged one on the way is reported.

    Raises `UserError` where none does: a run must not begin again over what may still be worth saving.
    """
    for checkpoint in sorted(checkpoints, reverse=True):
        try:
            checkpoint.verify()
        except UserError as error:
            report(f"{error}; falling back to the one before")
            continue
        return checkpoint
    raise UserError(
        f"run {run.name}: none of its {len(checkpoints)} checkpoints is intact; start a new run, or bring back "
        f"the files in {run.checkpoints_path}"
    )


def choose_checkpoint(
    run: RunDirectory, which: str, report: Callable[[str], None] | None = None, *, to_read: bool = False
) -> Checkpoint:
    """`latest`, `best` (lowest held-out loss) or a step's number, verified. Raises `UserError` naming what there is.

    With `report`, `latest` passes damaged ones over and reports them. `to_read`, and not to go on from, the best may be
    one that the run has gone back behind.
    """
    checkpoints = list_checkpoints(run)
    if not checkpoints:
        raise UserError(f"run {run.name} has no checkpoint yet")
    steps = ", ".join(str(item.step) for item in checkpoints)
    if which == "latest" and report is not None:
        return latest_intact(run, checkpoints, report)
    if which == "latest":
        chosen: Checkpoint | None = checkpoints[-1]
    elif which == "best":
        chosen = best_checkpoint(_folders(run) if to_read else checkpoints) or checkpoints[-1]
    else:
        chosen = next((item for item in checkpoints if which.isdigit() and item.step == int(which)), None)
    if chosen is None:
        raise UserError(f"run {run.name} has no checkpoint {which!r}; there are latest, best and steps {steps}")
    chosen.verify()
    return chosen


def best_checkpoint(checkpoints: Sequence[Checkpoint]) -> Checkpoint | None:
    """The checkpoint with the lowest held-out loss, or None where none was measured."""
    scored: list[tuple[float, Checkpoint]] = []
    for checkpoint in checkpoints:
        with contextlib.suppress(UserError):
            score = checkpoint.state().get("val_loss")
            if score is not None:
                scored.append((float(score), checkpoint))
    return min(scored)[1] if scored else None


def prune_checkpoints(run: RunDirectory, keep: int) -> None:
    """The best of the current line stays, the best of all where the run has gone back behind it, and the `keep` newest.

    All others are deleted.

    So are those that no command can reach, as a later attempt left them behind, and what a killed writer left. Of the
    line, one whose state cannot be read is neither counted nor deleted: it may be the best.
    Raises `UserError` where the store, which knows the line, cannot be read.
    """
    line = list_checkpoints(run)
    readable = [checkpoint for checkpoint in line if _is_readable(checkpoint)]
    best = (best_checkpoint(readable), best_checkpoint(_folders(run)))
    stay = {*readable[-keep:], *best, *set(line).difference(readable)}
    for checkpoint in _folders(run):
        if checkpoint not in stay:
            with contextlib.suppress(OSError):
                _put_aside(checkpoint.path)
    _remove_leftovers(run)


def _is_readable(checkpoint: Checkpoint) -> bool:
    with contextlib.suppress(UserError):
        checkpoint.state()
        return True
    return False


def _holds(folder: Path, checksums: Mapping[str, str]) -> bool:
    """Whether a folder is a whole checkpoint with these files."""
    with contextlib.suppress(UserError):
        return bool(Checkpoint(0, 0, folder).verify()["files"] == checksums)
    return False


def _put_aside(path: Path) -> None:
    """Takes a checkpoint's name from a folder, if it is there, in one step: half of one must never pass for whole."""
    aside = path.with_name(f"{_DELETING}{path.name}")
    shutil.rmtree(aside, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        path.rename(aside)


def _remove_leftovers(run: RunDirectory) -> None:
    """What has been put aside, and what a killed writer left."""
    for prefix in (_WRITING, _DELETING):
        for leftover in run.checkpoints_path.glob(f"{prefix}*"):
            shutil.rmtree(leftover, ignore_errors=True)


def _write_state(folder: Path, state: Mapping[str, Any]) -> None:
    write_json(folder / STATE_FILE, {**state, "checksum": _checksum(state)})


def _checksum(state: Mapping[str, Any]) -> str:
    """Of what JSON keeps of it, however it is laid out."""
    kept = json.loads(json.dumps(state))
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
