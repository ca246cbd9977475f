"""The run directory: names, the lock, damaged and foreign files, and a store that cannot be written."""

from __future__ import annotations

import contextlib
import math
import os
import resource
import sqlite3
import time
from pathlib import Path

import numpy as np
import pytest

from engine.errors import UserError
from engine.events import Level, Notice, Reading
from engine.runs import DAMAGED, RunLock, create_run, list_runs
from engine.schema import SCHEMA_VERSION
from engine.store import RunDirectory
from engine.store_writer import StoreWriter

IDENTITY = {"profile": {"kind": "retention-lm"}}


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return create_run(tmp_path, "tiny", IDENTITY)


def test_a_name_that_is_taken_is_refused_and_one_that_is_not_given_is_found(run: RunDirectory, tmp_path: Path) -> None:
    assert [create_run(tmp_path, "tiny", IDENTITY).name for _ in range(2)] == ["tiny-2", "tiny-3"]
    with pytest.raises(UserError, match=r"run tiny-2 exists already .*; choose another --name, or .* resume tiny-2"):
        create_run(tmp_path, "other", IDENTITY, "tiny-2")
    for name in ("../out", ".hidden", "", " x", "a\nb"):
        with pytest.raises(UserError, match="cannot be used"):
            create_run(tmp_path, "tiny", IDENTITY, name)


def test_what_a_killed_start_left_does_not_take_a_name(run: RunDirectory, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert create_run(tmp_path, "other", IDENTITY, "empty").identity()["name"] == "empty"
    (tmp_path / ".new-1").mkdir()
    (tmp_path / ".new-1" / "run.json").write_bytes(run.identity_path.read_bytes())
    assert sorted(summary.name for summary in list_runs(tmp_path)) == ["empty", "tiny"]
    for name in ("file", "folder"):
        (tmp_path / name).mkdir() if name == "folder" else (tmp_path / name).write_text("mine")
    (tmp_path / "folder" / "mine").write_text("")
    for name in ("file", "folder"):
        with pytest.raises(UserError, match="exists already"):
            create_run(tmp_path, "other", IDENTITY, name)
        assert create_run(tmp_path, name, IDENTITY).name == f"{name}-2"
    assert (tmp_path / "file").read_text() == "mine" and (tmp_path / "folder" / "mine").exists()


def test_a_run_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        with pytest.raises(UserError, match=r"runs folder .* cannot be written: File too large"):
            create_run(runs, "tiny", IDENTITY)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(runs.iterdir())
    assert create_run(runs, "tiny", IDENTITY).name == "tiny"


def test_one_lock_at_a_time(run: RunDirectory) -> None:
    lock = RunLock(run)
    assert run.is_live()
    with pytest.raises(UserError, match="run tiny is being trained by another process; stop that one first"):
        RunLock(run)
    lock.release()
    assert not run.is_live()
    RunLock(run).release()


def test_a_lock_that_cannot_be_written_is_one_line(run: RunDirectory) -> None:
    run.lock_path.mkdir()
    with pytest.raises(UserError, match="lock cannot be written: Is a directory"):
        RunLock(run)


def test_unreadable_runs_do_not_hide_the_others(run: RunDirectory, tmp_path: Path) -> None:
    broken = {name: create_run(tmp_path, name, IDENTITY) for name in ("garbage", "folder", "foreign", "newer")}
    broken["garbage"].database_path.write_bytes(b"no database " * 100)
    broken["folder"].database_path.mkdir()
    for name in ("foreign", "newer"):
        store = StoreWriter(broken[name])
        store.begin_attempt(0, 10)
        store.close()
    with sqlite3.connect(broken["foreign"].database_path) as database:
        database.execute("UPDATE attempt SET state = 'hibernating'")
    with sqlite3.connect(broken["newer"].database_path) as database:
        database.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    (tmp_path / "no run").mkdir()
    (tmp_path / "file").write_text("")
    listed = list_runs(tmp_path)
    assert [summary.name for summary in listed if summary.state != DAMAGED] == ["tiny"]
    assert {summary.name for summary in listed if summary.state == DAMAGED} == broken.keys()
    for name in ("garbage", "folder", "newer"):
        with pytest.raises(UserError, match=r"run\.sqlite"):
            broken[name].attempts()
        with pytest.raises(UserError, match=r"run\.sqlite"):
            StoreWriter(broken[name])


def test_a_store_that_another_process_holds_costs_no_time_and_no_row(run: RunDirectory) -> None:
    store = StoreWriter(run)
    store.begin_attempt(0, 10)
    assert store.flush() is None
    other = sqlite3.connect(run.database_path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    store.record(1, {"loss": 2.0})
    began = time.monotonic()
    assert store.flush() == "database is locked"
    assert time.monotonic() - began < 1
    other.execute("ROLLBACK")
    other.close()
    store.record(2, {"loss": 1.0})
    began = time.monotonic()
    assert store.flush() == "database is locked"
    assert time.monotonic() - began < 0.05, "tries in vain come seldom"
    assert store.settle() is None
    store.record(3, {"loss": 0.5})
    assert store.close() is None
    assert run.curve("loss")[1].tolist() == [2.0, 1.0, 0.5]


def test_what_is_refused_when_a_checkpoint_is_written_waits_in_a_file(run: RunDirectory) -> None:
    """So that it outlives its process: here one that never closes its store, as when it is killed."""
    store = StoreWriter(run)
    store.begin_attempt(0, 10)
    store.record(1, {"loss": 2.0})
    assert store.flush() is None
    with contextlib.closing(sqlite3.connect(run.database_path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        store.begin_attempt(1, 10)
        store.record(2, {"loss": math.nan, "val_loss": 1.0})
        store.record_event(Notice(text="seen"))
        assert store.settle() == "database is locked"
        assert run.curve("loss")[0].tolist() == [1]
        with pytest.raises(UserError, match=r"run\.sqlite cannot be written: database is locked"):
            StoreWriter(run)
    for _ in range(2):  # the second time as when the first was killed before it could forget the file
        waiting = (run.path / "waiting.json").read_bytes()
        again = StoreWriter(run)
        assert not (run.path / "waiting.json").exists()
        again.close()
        (run.path / "waiting.json").write_bytes(waiting)
    assert [(attempt.id, attempt.from_step) for attempt in run.attempts()] == [(1, 0), (2, 1)]
    np.testing.assert_array_equal(run.curve("loss")[1], [2.0, math.nan])
    assert run.last("val_loss") == (2, 1.0)
    assert [event["text"] for event in run.events()] == ["seen"]
    for content in ("no rows", '[["strange", [1]]]', "[1]"):
        (run.path / "waiting.json").write_text(content)
        with pytest.raises(UserError, match=r"waiting\.json"):
            StoreWriter(run)


def test_what_is_settled_needs_no_log(run: RunDirectory) -> None:
    """Also while somebody reads, who must never hold it up."""
    store = StoreWriter(run)
    store.begin_attempt(0, 10)
    store.record(1, {"loss": 2.0})
    assert store.flush() is None
    with run.reader() as reader:
        assert reader is not None
        reader.execute("BEGIN")
        assert reader.execute("SELECT count(*) FROM value").fetchone() == (1,)
        store.record(2, {"loss": 1.0})
        assert store.settle() is None
    assert store.settle() is None
    copied = RunDirectory(run.path.with_name("copied"))
    copied.path.mkdir()
    copied.database_path.write_bytes(run.database_path.read_bytes())
    assert copied.curve("loss")[1].tolist() == [2.0, 1.0]
    store.close()


def test_a_value_of_the_step_that_an_attempt_goes_on_from_is_on_the_curve(run: RunDirectory) -> None:
    """It belongs to the attempt that took the step, also where that is not the one just before."""
    store = StoreWriter(run)
    for from_step, until in [(0, 6), (4, 8), (3, 3)]:
        store.begin_attempt(from_step, 10)
        for step in range(from_step + 1, until + 1):
            store.record(step, {"loss": float(step)})
        assert store.flush() is None
    store.record(3, {"val_loss": 0.5})
    store.record(4, {"loss": 40.0})
    store.close()
    assert run.curve("val_loss")[0].tolist() == [3]
    assert run.curve("loss")[1].tolist() == [1.0, 2.0, 3.0, 40.0]


def test_who_looks_at_a_run_writes_nothing(run: RunDirectory, tmp_path: Path) -> None:
    store = StoreWriter(run)
    store.begin_attempt(0, 1)
    store.close()
    for file in run.path.iterdir():
        os.utime(file, (1e9, 1e9))
    assert run.attempts() and run.last("loss") is None
    assert [summary.updated for summary in list_runs(tmp_path)] == [1e9]


def test_readings_come_back_as_they_were(run: RunDirectory) -> None:
    known = Reading(
        time=2.0, level=Level.YELLOW, cause="of tests", limit_bytes=1, available_bytes=0, swap_bytes=3, heat="fair",
        stalled_percent=0.5, gpu_bytes=4, gpu_limit_bytes=5, process_bytes=6, on_mains=False, battery_percent=7.5,
        lid_closed=True,
    )  # fmt: skip
    unknown = Reading(time=1.0)
    writer = StoreWriter(run)
    for reading in (known, unknown):
        writer.record_reading(reading)
    assert writer.flush() is None
    assert run.readings() == [unknown, known]
    assert run.readings(since=1.5) == [known]
    writer.close()


def test_a_store_of_the_first_release_is_read_and_gone_on_with(run: RunDirectory) -> None:
    writer = StoreWriter(run)
    writer.begin_attempt(0, 10)
    writer.record(1, {"loss": 1.5})
    writer.close()
    with contextlib.closing(sqlite3.connect(run.database_path)) as database:
        database.executescript("DROP TABLE host; PRAGMA user_version = 1;")
    assert run.last("loss") == (1, 1.5) and run.readings() == []
    writer = StoreWriter(run)
    writer.begin_attempt(1, 10)
    writer.record_reading(Reading(time=1.0))
    writer.record(2, {"loss": 1.25})
    writer.close()
    assert run.last("loss") == (2, 1.25) and len(run.readings()) == 1
