"""Which checkpoints count, which are the best, and which are deleted."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from engine.backend import mx
from engine.checkpoint import (
    Checkpoint,
    CheckpointError,
    best_checkpoint,
    choose_checkpoint,
    list_checkpoints,
    newest_attempt,
    prune_checkpoints,
    save_checkpoint,
)
from engine.errors import UserError
from engine.runs import create_run
from engine.store import RunDirectory
from engine.store_writer import StoreWriter


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
    assert folders(run) == ["step-0000004", "step-0000008", "step-0000010", "step-0000010.a2"], "the best of all, too"
    assert choose_checkpoint(run, "best").step == 4
    assert choose_checkpoint(run, "best", to_read=True).path.name == "step-0000010"


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


def test_a_changed_bit_of_the_state_is_noticed_wherever_it_is(run: RunDirectory) -> None:
    """Else a run could go on from step 18 as step 19. Only white space may change."""
    checkpoint = save(run, 18, val_loss=1.0)
    file, state = checkpoint.path / "state.json", checkpoint.state()
    whole = file.read_bytes()
    for place in range(len(whole)):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        try:
            assert checkpoint.state() == state
            assert whole[place : place + 1].isspace()
        except UserError:
            continue
    file.write_bytes(whole)
    assert checkpoint.verify() == state


def test_a_checkpoint_of_the_first_release_is_read(run: RunDirectory) -> None:
    checkpoint = save(run, 2)
    file = checkpoint.path / "state.json"
    older = json.loads(file.read_text()) | {"format": 1}
    del older["checksum"]
    file.write_text(json.dumps(older))
    assert checkpoint.verify()["step"] == 2


def test_what_a_killed_writer_left_makes_room_for_the_next(run: RunDirectory) -> None:
    save(run, 2)
    for name in (".writing-step-0000004", ".deleting-step-0000001"):
        (run.checkpoints_path / name).mkdir()
        (run.checkpoints_path / name / "model.safetensors").write_bytes(b"half")
    seen: list[str] = []

    def write_model(folder: Path) -> None:
        seen.extend(folders(run))

    save_checkpoint(run, 4, 1, write_model, {"v": mx.zeros(2)}, {"val_loss": None})
    assert seen == [".writing-step-0000004", "step-0000002"]
    assert folders(run) == names(run) == ["step-0000002", "step-0000004"]


def test_a_sync_that_fails_is_said_and_a_second_try_keeps_the_first(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name is given before the last sync: what has it is whole, and stays so at every moment."""
    count, sync = [0], os.fsync

    def fail_at(number: int) -> None:
        def fsync(descriptor: int) -> None:
            count[0] += 1
            if count[0] == number:
                raise OSError(5, "Input/output error")
            sync(descriptor)

        count[0] = 0
        monkeypatch.setattr(os, "fsync", fsync)

    fail_at(0)
    save(run, 2)
    syncs = count[0]
    for number in range(1, syncs + 1):
        fail_at(number)
        with pytest.raises(CheckpointError, match="step 4 could not be written: Input/output error"):
            save(run, 4)
        for checkpoint in list_checkpoints(run):
            checkpoint.verify()
        assert names(run)[0] == "step-0000002"
    fail_at(0)
    save(run, 4, val_loss=1.0)
    assert folders(run) == ["step-0000002", "step-0000004"]
    assert list_checkpoints(run)[-1].verify()["val_loss"] == 1.0


def test_a_folder_that_is_gone_is_not_made_again(run: RunDirectory) -> None:
    """A run that somebody deletes while it trains must not leave half a run behind."""
    save(run, 2)
    shutil.rmtree(run.path)
    with pytest.raises(CheckpointError, match="No such file"):
        save(run, 4)
    assert not run.path.exists()


def test_what_cannot_be_read_is_not_deleted(run: RunDirectory) -> None:
    """It may have been the best, and be read again tomorrow."""
    best = save(run, 2, val_loss=1.0)
    for step in (4, 6):
        save(run, step, val_loss=2.0)
    unreadable = save(run, 8, val_loss=2.0)
    states = {checkpoint: (checkpoint.path / "state.json") for checkpoint in (best, unreadable)}
    contents = {checkpoint: file.read_bytes() for checkpoint, file in states.items()}
    for file in states.values():
        file.unlink()
    prune_checkpoints(run, keep=1)
    for checkpoint, file in states.items():
        file.write_bytes(contents[checkpoint])
    assert [checkpoint.step for checkpoint in list_checkpoints(run)] == [2, 4, 6, 8]
    prune_checkpoints(run, keep=1)
    assert [checkpoint.step for checkpoint in list_checkpoints(run)] == [2, 8]
