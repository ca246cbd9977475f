"""What a process leaves that vanishes at any moment of its bookkeeping, and that the next one can go on with it.

Every moment before and after a call that changes the disk, in turn: with `RETENTION_TUI_FAULTS=200`. A part of them
otherwise.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from crash_points import EVERY, SCORES, UNTIL

from engine.checkpoint import best_checkpoint, list_checkpoints
from engine.errors import UserError
from engine.runs import list_runs
from engine.store import RunDirectory

FAULTS = int(os.environ.get("RETENTION_TUI_FAULTS", "0"))
STRIDE = 1 if FAULTS else 9
MOMENTS_AT_LEAST = 200


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """In memory where that can be had: many small files are synced, and no power will be lost."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


@pytest.mark.timeout(600)
def test_whatever_moment_a_process_vanishes_at(place: Path) -> None:
    script = Path(__file__).with_name("crash_points.py")
    subprocess.run([sys.executable, script, place, "1", str(STRIDE)], check=True)
    moments = sorted(int(path.name) for path in place.iterdir())
    assert moments[-1] > MOMENTS_AT_LEAST
    for moment in moments:
        folder = place / str(moment)
        try:
            check_crashed(folder)
            check_recovered(RunDirectory(folder / "recovered" / "run"))
        except (AssertionError, UserError) as error:
            raise AssertionError(f"after moment {moment}: {error}") from error


def check_crashed(folder: Path) -> None:
    run = RunDirectory(folder / "crashed" / "run")
    assert len(list_runs(folder / "crashed")) == run.path.exists(), "a run is there with its run.json, or not at all"
    if not run.path.exists():
        return
    checkpoints = list_checkpoints(run)
    for checkpoint in checkpoints:
        checkpoint.verify()
    said = [int(line) for line in (folder / "said").read_text().split()] if (folder / "said").exists() else []
    steps = [checkpoint.step for checkpoint in checkpoints]
    assert not said or max(steps) >= said[-1], f"{said} were saved, {steps} are left"
    assert not said or EVERY in steps, "the best is lost"
    check_rows(run, steps)
    # Where the log of the store is lost too, as after a loss of power, what led to the checkpoints must not be.
    for name in ("run.sqlite-wal", "run.sqlite-shm"):
        (run.path / name).unlink(missing_ok=True)
    check_rows(run, steps)


def check_rows(run: RunDirectory, checkpoints: list[int]) -> None:
    steps = run.curve("loss")[0].tolist()
    assert steps == list(range(1, len(steps) + 1)), "every step once"
    assert len(steps) >= max(checkpoints, default=0), "a checkpoint is newer than the rows"


def check_recovered(run: RunDirectory) -> None:
    last = UNTIL[-1]
    assert run.identity()["data_digest"] == "text"
    assert run.curve("loss")[0].tolist() == list(range(1, last + 1))
    checkpoints = list_checkpoints(run)
    for checkpoint in checkpoints:
        checkpoint.verify()
    assert checkpoints[-1].step == last
    best = best_checkpoint(checkpoints)
    assert best is not None and best.state()["val_loss"] == min(SCORES.values())
    assert not list(run.path.rglob(".*")), "nothing half-written stays behind"
    assert {path.name for path in run.checkpoints_path.iterdir()} == {item.path.name for item in checkpoints}
