"""One process's runs: one at a time, never two on the same run, and nothing worth keeping is deleted."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from engine.errors import ExitCode, UserError
from engine.events import RunEnded, RunOpened, StepCompleted
from engine.runs import RunLock
from engine.store import RunDirectory
from retention_tui.session import LocalClient, Session

LONG = ["train.steps=100000"]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[[], Session]]:
    sessions: list[Session] = []

    def session() -> Session:
        sessions.append(Session(tmp_path / "runs"))
        return sessions[-1]

    yield session
    for session in sessions:
        session.stop("the test is over")
        session.finish()


def until(client: LocalClient, kind: type) -> None:
    while not any(isinstance(event, kind) for event in client.events(timeout_seconds=1)):
        assert client.alive, f"the run ended without {kind.__name__}"


def test_two_who_start_at_once_get_one_run(make: Callable[[], Session], tiny: Path, tmp_path: Path) -> None:
    session, together = make(), threading.Barrier(2)
    results: list[LocalClient | UserError] = []

    def start() -> None:
        together.wait()
        try:
            results.append(session.start(str(tiny), LONG))
        except UserError as error:
            results.append(error)

    threads = [threading.Thread(target=start) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(results) == 2
    (refusal,) = [result for result in results if isinstance(result, UserError)]
    assert "already" in str(refusal) and "\n" not in str(refusal)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["tiny"]
    with pytest.raises(UserError, match="run tiny is being trained here already; stop that one first"):
        session.start(str(tiny), LONG)
    with pytest.raises(UserError, match="run tiny is being trained here already"):
        session.resume("tiny")


def test_a_run_that_has_said_its_end_makes_room(make: Callable[[], Session], tiny: Path) -> None:
    session = make()
    for name in ("tiny", "tiny-2"):
        client = session.start(str(tiny), ["train.steps=1"])
        assert client.run.name == name
        until(client, RunEnded)
    until(session.resume("tiny-2"), RunEnded)
    assert session.finish() == ExitCode.OK


def test_one_run_is_trained_by_one_process(make: Callable[[], Session], tiny: Path) -> None:
    first, second = make(), make()
    client = first.start(str(tiny), LONG)
    until(client, StepCompleted)
    with pytest.raises(UserError, match="run tiny is being trained by another process; stop that one first"):
        second.resume("tiny")
    with pytest.raises(UserError, match="run tiny exists already"):
        second.start(str(tiny), LONG, "tiny")
    assert client.alive and second.finish() == ExitCode.OK
    first.stop("enough")
    assert first.finish() == ExitCode.OK
    until(second.resume("tiny"), RunOpened)


def test_a_damaged_store_is_one_line(make: Callable[[], Session], tiny: Path) -> None:
    session = make()
    run = session.start(str(tiny), ["train.steps=1"]).run
    session.finish()
    run.database_path.write_bytes(b"no database " * 1000)
    session.resume("tiny")
    assert session.finish() == ExitCode.BAD_INPUT
    assert session.ended is not None
    assert session.ended.reason == f"{run.database_path} cannot be used: file is not a database"
    assert run.checkpoints_path.exists()
    RunLock(run).release()


def test_a_new_run_that_never_began_leaves_its_name(make: Callable[[], Session], tiny: Path, tmp_path: Path) -> None:
    session = make()
    session.start(str(tiny), ["data.files=nowhere.txt"])
    assert session.finish() == ExitCode.BAD_INPUT
    assert not (tmp_path / "runs" / "tiny").exists()


def test_a_new_run_with_a_checkpoint_is_kept(make: Callable[[], Session], tiny: Path, tmp_path: Path) -> None:
    """As where a full disk took the checkpoints and not the store."""
    session = make()
    session.on_launch = lambda run: (run.checkpoints_path / "step-0000004").mkdir(parents=True)
    session.start(str(tiny), ["data.files=nowhere.txt"])
    assert session.finish() == ExitCode.BAD_INPUT
    run = RunDirectory(tmp_path / "runs" / "tiny")
    assert run.checkpoints_path.is_dir()
    RunLock(run).release()
