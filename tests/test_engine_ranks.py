"""Two processes train one run: equal weights, and those of one process at the same effective batch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

LAUNCH = [str(Path(sys.executable).parent / "mlx.launch"), "--backend", "ring", "-n"]


def train(folder: Path, ranks: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    launch = [*LAUNCH, str(ranks), "--"] if ranks > 1 else []
    command = [*launch, sys.executable, "-m", "retention_tui", *arguments, "--headless"]
    return subprocess.run(
        [*command, "--runs-dir", str(folder / "runs")], capture_output=True, text=True, check=False, timeout=100
    )


def weights(folder: Path, run: str) -> dict[str, np.ndarray]:
    newest = max((folder / "runs" / run / "checkpoints").iterdir())
    return load_file(newest / "model.safetensors")


@pytest.fixture
def start(tiny: Path) -> list[str]:
    # Adam divides every entry by its own size, so rounding alone moves entries whose gradient is nothing but rounding;
    # an epsilon cannot be set, so the learning rate is kept small enough for 1e-5 to mean something: see the assertion.
    settings = ("train.steps=8", "train.learning_rate=1e-3", "train.batch_size=8", "train.micro_batch_size=2")
    return ["run", str(tiny), *(part for setting in settings for part in ("--set", setting))]


def test_two_ranks_train_as_one(start: list[str], tmp_path: Path) -> None:
    for ranks in (1, 2):
        done = train(tmp_path, ranks, *start, "--name", f"of-{ranks}")
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("finished at step 8") == 1, "rank 0 alone speaks"
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["of-1", "of-2"], "rank 0 alone writes"
    one, two = weights(tmp_path, "of-1"), weights(tmp_path, "of-2")
    for name, array in one.items():
        moved = np.abs(array).max()
        assert np.abs(array - two[name]).max() <= 1e-5 * max(moved, 1), name


def test_two_ranks_resume(start: list[str], tmp_path: Path) -> None:
    assert train(tmp_path, 2, *start, "--name", "whole").returncode == 0
    assert train(tmp_path, 2, *start, "--set", "checkpoint.every=3", "--name", "part").returncode == 0
    for newer in (path for path in (tmp_path / "runs/part/checkpoints").iterdir() if path.name > "step-0000006"):
        (newer / "optimizer.safetensors").write_bytes(b"damaged")
    done = train(tmp_path, 2, "resume", "part")
    assert done.returncode == 0, done.stderr
    assert "continues at step" in done.stdout
    whole, part = weights(tmp_path, "whole"), weights(tmp_path, "part")
    assert all(np.array_equal(array, part[name]) for name, array in whole.items())


def test_bad_input_ends_all_ranks(start: list[str], tmp_path: Path) -> None:
    done = train(tmp_path, 2, *start, "--set", "data.files=nowhere.txt", "--name", "bad")
    assert "nowhere.txt" in done.stderr + done.stdout
    assert "Traceback" not in done.stderr + done.stdout
    done = train(tmp_path, 2, *start, "--set", "train.batch_size=7", "--name", "odd")
    assert "cannot be shared by 2 ranks" in done.stderr + done.stdout
