"""Which checkpoints count, which are the best, and which are deleted."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.backend import mx
from engine.checkpoint import (
    Checkpoint,
    best_checkpoint,
    choose_checkpoint,
    list_checkpoints,
    newest_attempt,
    prune_checkpoints,
    save_checkpoint,
)
from engine.errors import UserError
from engine.runs import create_run
from engine.store import RunDirectory, StoreWriter


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return create_run(tmp_path / "runs", "tiny", {"profile": {"kind": "retention-lm"}})


def save(run: RunDirectory, step: int, attempt: int = 1, val_loss: float | None = None) -> Checkpoint:
    def write_model(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"weights")

    return save_checkpoint(run, step, attempt, write_model, {"v": mx.zeros(2)}, {"val_loss": val_loss})


def begin_attempts(run: RunDirectory, *from_steps: int) -> None:
    store = StoreWriter(run)
    for from_step in from_steps:
        store.begin_attempt(from_step, 100, newest_attempt(run))
        assert store.flush() is None
    store.close()


def names(run: RunDirectory) -> list[str]:
    return [checkpoint.path.name for checkpoint in list_checkpoints(run)]


def folders(run: RunDirectory) -> list[str]:
    return sorted(path.name for path in run.checkpoints_path.iterdir())


def test_an_attempt_without_a_row_counts_by_its_own_numbers(run: RunDirectory) -> None:
    begin_attempts(run, 0)
    save(run, 4)
    save(run, 8, attempt=2)  # what told of it was never stored
    assert names(run) == ["step-0000004", "step-0000008.a2"]
    begin_attempts(run, 8)
    assert [attempt.id for attempt in run.attempts()] == [1, 3], "the number of the lost attempt is not used again"
    assert names(run) == ["step-0000004", "step-0000008.a2"]
    begin_attempts(run, 4)
    assert names(run) == ["step-0000004"], "it was left behind"


def test_without_any_row_all_count_and_the_newest_attempt_wins(run: RunDirectory) -> None:
    for step, attempt in [(4, 1), (8, 1), (8, 2), (12, 2)]:
        save(run, step, attempt)
    assert names(run) == ["step-0000004", "step-0000008.a2", "step-0000012.a2"]


def test_the_newest_and_the_best_of_the_line_stay_and_nothing_else(run: RunDirectory) -> None:
    begin_attempts(run, 0)
    for step, val_loss in [(2, 1.5), (4, 1.0), (6, 2.0), (8, None), (10, 0.5)]:
        save(run, step, val_loss=val_loss)
    begin_attempts(run, 8)
    save(run, 10, attempt=2)
    (run.checkpoints_path / ".writing-step-0000012").mkdir()
    prune_checkpoints(run, keep=2)
    assert folders(run) == ["step-0000004", "step-0000008", "step-0000010.a2"]
    assert choose_checkpoint(run, "best").step == 4


def test_nothing_is_deleted_while_the_store_cannot_be_read(run: RunDirectory) -> None:
    begin_attempts(run, 0)
    for step in (2, 4, 6):
        save(run, step)
    run.database_path.write_bytes(b"no database " * 100)
    with pytest.raises(UserError, match=r"run\.sqlite cannot be read"):
        prune_checkpoints(run, keep=1)
    assert len(folders(run)) == 3


def test_a_score_that_is_noted_later_counts(run: RunDirectory) -> None:
    save(run, 2, val_loss=2.0)
    late = save(run, 4)
    late.note(val_loss=1.0)
    late.verify()
    assert best_checkpoint(list_checkpoints(run)) == late
    prune_checkpoints(run, keep=1)
    assert folders(run) == ["step-0000004"]
