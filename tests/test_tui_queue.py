"""The queue: real processes, one after the other, that are stopped, killed and left alone by their terminal."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from engine.errors import UserError
from engine.runs import RunLock
from engine.store import RunDirectory
from retention_tui.queue_record import new_queue, unfinished_queue

COMMAND = [sys.executable, "-P", "-m", "retention_tui", "queue"]
QUICK = ["--set", "validate.every=0", "--set", "checkpoint.every=0", "--set", "model.layers=1"]
LONG = [*QUICK, "--set", "train.steps=1000000"]


class Started:
    """A queue at work in `folder`."""

    def __init__(self, folder: Path, *arguments: str | Path, **options: Any) -> None:
        self.folder = folder
        self.process = subprocess.Popen(
            [*COMMAND, *map(str, arguments), "--runs-dir", str(folder)],
            **{"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options},
        )

    def entries(self) -> list[dict[str, Any]]:
        (path,) = self.folder.glob("queue-*.json")
        entries: list[dict[str, Any]] = json.loads(path.read_text())["entries"]
        return entries

    def states(self) -> list[str]:
        return [entry["state"] for entry in self.entries()] if list(self.folder.glob("queue-*.json")) else []

    def wait_for_step(self, run: str, step: int = 3) -> None:
        directory = RunDirectory(self.folder / run)

        def reached() -> bool:
            assert self.process.poll() is None, self.process.communicate()
            return directory.database_path.exists() and (directory.last("loss") or (0,))[0] >= step

        wait_for(reached)

    def end(self) -> tuple[int, str, str]:
        output, errors = self.process.communicate(timeout=60)
        return self.process.returncode, (output or b"").decode(), (errors or b"").decode()


def wait_for(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Started]]:
    started: list[Started] = []

    def start(*arguments: str | Path, **options: Any) -> Started:
        started.append(Started(tmp_path / "runs", *arguments, **options))
        return started[-1]

    yield start
    for queue in started:
        queue.process.kill()
    for process in psutil.process_iter():  # also the runs of a queue that is dead
        with suppress(psutil.Error):
            if str(tmp_path / "runs") in process.cmdline():
                process.kill()
    for queue in started:
        with suppress(ValueError):  # read to its end already
            queue.process.communicate()


def children(queue: Started) -> list[psutil.Process]:
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(queue.process.pid).children()
    return []


def profile(tiny: Path, name: str, change: Callable[[str], str] = lambda text: text) -> Path:
    path = tiny.with_name(f"{name}.toml")
    path.write_text(change(tiny.read_text()))
    return path


def test_a_night_of_runs_whatever_becomes_of_each(start: Callable[..., Started], tiny: Path) -> None:
    """One fails, one is killed, one is stopped alone, and the queue with the next; the terminal is lost meanwhile.
    What lies in the present folder is not imported."""
    tiny.with_name("json.py").write_text("raise SystemExit('imported from the present folder')")
    broken = profile(tiny, "broken", lambda text: text.replace('"text"', '"nowhere"'))
    endless = profile(tiny, "endless", lambda text: text.replace("steps = 12", "steps = 1_000_000"))
    brief = profile(tiny, "brief", lambda text: text.replace("steps = 12", "steps = 80"))
    master, slave = pty.openpty()
    terminal = {"stdin": slave, "stdout": slave, "stderr": slave, "start_new_session": True, "cwd": tiny.parent}
    queue = start(broken, endless, endless, brief, tiny, *QUICK, **terminal)
    os.close(slave)
    queue.wait_for_step("endless")
    os.close(master)
    queue.process.send_signal(signal.SIGHUP)
    code, _, errors = start(tiny, "--anyway").end()
    assert code == 2 and "another queue is at work" in errors and errors.count("\n") == 1
    for run, number in (("endless", signal.SIGKILL), ("endless-2", signal.SIGTERM)):
        queue.wait_for_step(run)
        (child,) = children(queue)
        child.send_signal(number)
    queue.wait_for_step("brief")
    queue.process.send_signal(signal.SIGINT)
    assert queue.end()[0] == 130
    (path,) = queue.folder.glob("queue-*.json")
    assert queue.states() == ["failed", "failed", "stopped", "interrupted", "pending"]
    failed, killed, stopped, *_ = queue.entries()
    assert failed["exit_code"] == 2 and "nowhere" in failed["reason"]
    assert (killed["exit_code"], killed["reason"]) == (137, "killed by SIGKILL")
    assert (stopped["exit_code"], stopped["reason"]) == (143, "stopped by SIGTERM")
    assert failed["started"] <= failed["ended"] <= killed["started"] <= killed["ended"] <= stopped["started"]
    assert not (queue.folder / "broken").exists()
    run = RunDirectory(queue.folder / "brief")
    stopped_at = (run.last("loss") or (0,))[0]
    assert run.summary().state == "stopped" and (run.checkpoints_path / f"step-{stopped_at:07}").is_dir()

    code, output, errors = start("--continue").end()
    assert (code, errors) == (2, "")  # that of the first that failed
    assert queue.states() == ["failed", "failed", "stopped", "finished", "finished"]
    assert [attempt.from_step for attempt in run.attempts()] == [0, stopped_at]
    assert (RunDirectory(queue.folder / "tiny").last("loss") or (0,))[0] == 12
    *_, counted, first, _, _, _, last = output.splitlines()
    assert "2 failed, 1 stopped, 2 finished" in counted
    assert (first.split()[:2], last.split()[:2]) == (["failed", "broken"], ["finished", "tiny"])

    path.write_text(path.read_text().replace('"state": "finished"', '"state": "running"', 1))
    held = RunLock(run)  # as by an app that shows its end
    code, _, errors = start("--continue").end()
    held.release()
    assert (code, errors) == (2, "") and queue.states()[3] == "finished" and len(run.attempts()) == 2
    assert unfinished_queue(queue.folder) is None


def test_what_is_wrong_is_refused_before_the_first_starts(
    start: Callable[..., Started], tiny: Path, tmp_path: Path
) -> None:
    wrong = profile(tiny, "wrong", lambda text: text.replace("steps = 12", "stepz = 12"))
    queue = start(tiny, wrong)
    code, output, errors = queue.end()
    assert (code, output) == (2, "")
    assert "stepz" in errors and errors.count("\n") == 1
    assert not queue.folder.exists()
    code, output, errors = start("--continue", "--set", "train.steps=3").end()
    assert (code, output) == (2, "")
    assert "--set" in errors and "--continue" in errors and errors.count("\n") == 1
    vast = ["model.width=16384", "model.layers=200", "model.heads=256", "model.hidden=65536"]
    with pytest.raises(UserError, match=rf"^{re.escape(str(tiny))}: .*--anyway"):
        new_queue(queue.folder, [str(tiny)], vast)
    assert not queue.folder.exists()
    (tmp_path / "queue-20260101-000000.json").write_text('{"format": 1, "entries": [{"pro')
    with pytest.raises(UserError, match=r"^[^\n]*queue-20260101-000000.json cannot be read[^\n]*$"):
        unfinished_queue(tmp_path)


def test_a_killed_queue_goes_on_with_the_run_that_was_under_way(start: Callable[..., Started], tiny: Path) -> None:
    """At first the run hangs and is given up. Then the queue alone is killed; the run outlives it, and is awaited."""
    queue = start(tiny, *LONG, "--set", "checkpoint.every=10")
    queue.wait_for_step("tiny", 15)
    (child,) = children(queue)
    child.suspend()
    queue.process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert queue.process.poll() is None  # it waits for the checkpoint that shall come
    queue.process.send_signal(signal.SIGINT)
    assert queue.end()[0] == 130
    assert queue.states() == ["interrupted"]
    second = start("--continue")
    run = RunDirectory(queue.folder / "tiny")
    wait_for(lambda: len(run.attempts()) == 2)
    first, resumed = run.attempts()
    assert first.state == "training" and resumed.from_step >= 10
    second.process.kill()
    second.process.wait()
    third = start("--continue")
    assert third.process.stdout is not None
    assert b"1 of 1" in third.process.stdout.readline()
    assert b"waiting for that to end" in third.process.stdout.readline()
    third.process.send_signal(signal.SIGTERM)
    code, output, errors = third.end()
    assert (code, errors) == (143, "")
    assert third.states() == ["interrupted"] and "queue --continue" in output
    summary = run.summary()
    assert summary.state == "stopped" and not summary.live and len(run.attempts()) == 2
