"""Killed at any moment and resumed: the same losses, bit for bit, as a run that was left alone.

The short campaign runs with the tests. The long one: `RETENTION_TUI_KILLS=200 pytest tests/test_engine_kill.py`.
"""

from __future__ import annotations

import csv
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

KILLS = int(os.environ.get("RETENTION_TUI_KILLS", "4"))
STEPS = 150
COMMAND = [sys.executable, "-m", "retention_tui"]


def command(folder: Path, *arguments: str) -> list[str]:
    return [*COMMAND, *arguments, "--runs-dir", str(folder / "runs")]


def exported(folder: Path, run: str) -> list[tuple[str, ...]]:
    """Step, loss, grad norm and held-out loss of every step, as the export writes them: in full precision."""
    done = subprocess.run(command(folder, "export", run), capture_output=True, text=True, check=True)
    wanted = ("step", "loss", "grad_norm", "val_loss", "val_bits_per_byte", "trained_tokens", "learning_rate")
    return [tuple(row[name] for name in wanted) for row in csv.DictReader(done.stdout.splitlines())]


@pytest.mark.timeout(120 + 20 * KILLS)
def test_killed_runs_end_like_one_that_was_left_alone(tiny: Path, tmp_path: Path) -> None:
    settings = [f"train.steps={STEPS}", "validate.every=15", "checkpoint.every=7", "train.micro_batch_size=2"]
    start = ["run", str(tiny), *(part for setting in settings for part in ("--set", setting)), "--headless"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    subprocess.run(command(tmp_path, *start, "--name", "alone"), check=True, **quiet)  # type: ignore[call-overload]

    chance = random.Random(KILLS)
    arguments, kills = [*start, "--name", "killed"], 0
    while kills < KILLS:
        process = subprocess.Popen(command(tmp_path, *arguments), **quiet)  # type: ignore[call-overload]
        database = tmp_path / "runs" / "killed" / "run.sqlite"
        before = database.stat().st_mtime_ns if database.exists() else 0
        # Half of the kills fall on the start, where little may be on disk yet; the others on a run at work.
        if kills % 2:
            while process.poll() is None and (not database.exists() or database.stat().st_mtime_ns == before):
                time.sleep(0.005)
        time.sleep(chance.uniform(0, 1.5))
        if process.poll() is not None:
            _, errors = process.communicate()
            assert process.returncode == 0, errors.decode()
            break
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += 1
        if (tmp_path / "runs" / "killed" / "run.json").exists():
            arguments = ["resume", "killed", "--headless"]
    assert kills > 0
    done = subprocess.run(command(tmp_path, *arguments), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = exported(tmp_path, "killed")
    assert [row[0] for row in rows] == [str(step) for step in range(1, STEPS + 1)]
    assert rows == exported(tmp_path, "alone")
