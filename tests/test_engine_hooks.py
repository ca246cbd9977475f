"""Hooks: the user's own commands, run when something happens to a run, whatever becomes of them."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.config import Hooks, load_config
from engine.doctor import diagnose
from engine.errors import UserError
from engine.events import Alarm, Event, RunEnded, RunOpened, State, StepCompleted, Validated
from engine.hook_process import run_hook
from engine.hooks import HookRunner
from engine.store import RunDirectory
from engine.worker import Mailbox

COMMAND = [sys.executable, "-m", "retention_tui"]
ENDED = RunEnded(state=State.FINISHED, reason="all 3 steps are done", exit_code=0, step=3)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "config.toml"
    monkeypatch.setenv("RETENTION_TUI_CONFIG", str(path))
    return path


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    (tmp_path / "demo").mkdir()
    return RunDirectory(tmp_path / "demo")


def told(folder: Path) -> list[dict[str, Any]]:
    """What the hook `keep` has been told, in order."""
    path = folder / "told"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def keep(folder: Path) -> str:
    """A hook that writes down what it is told."""
    return f"cat >> '{folder}/told'"


def hear(run: RunDirectory, hooks: Hooks, *events: Event) -> str:
    """Lets a runner hear events to the end; returns the log."""
    mailbox = Mailbox()
    for event in events:
        mailbox.put(event)
    runner = HookRunner(hooks, run, mailbox)
    runner.start()
    assert runner.join(20)
    return run.log_path.read_text() if run.log_path.exists() else ""


def opened(run: RunDirectory) -> RunOpened:
    return RunOpened(
        run=run.name, directory=str(run.path), task="retention-lm", device="cpu", dtype="float32", parameters=9,
        step=0, total_steps=3, attempt=1,
    )  # fmt: skip


def test_a_hook_gets_the_event_and_where_the_run_stands(run: RunDirectory, tmp_path: Path) -> None:
    hooks = Hooks(finish=keep(tmp_path), failure="false")
    step = StepCompleted(
        step=3, total_steps=3, metrics={"loss": float("nan")}, elapsed_seconds=1.0, remaining_seconds=None
    )
    log = hear(run, hooks, opened(run), step, Validated(step=2, metrics={"val_loss": 1.75}, best=True), ENDED)
    (event,) = told(tmp_path)
    assert (event["event"], event["state"], event["exit_code"], event["step"]) == ("run_ended", "finished", 0, 3)
    assert (event["hook"], event["run"], event["directory"]) == ("finish", "demo", str(run.path))
    assert (event["loss"], event["total_steps"], event["best_val_loss"]) == ("nan", 3, 1.75)
    assert event["summary"] == "demo: finished at step 3: all 3 steps are done; best held-out loss 1.750"
    assert "hook finish: done in" in log


def test_a_best_loss_that_was_left_behind_is_not_told(run: RunDirectory, tmp_path: Path) -> None:
    bests = [Validated(step=step, metrics={"val_loss": 3.0 - step}, best=True) for step in (1, 2)]
    went_back = dataclasses.replace(opened(run), step=1)
    hear(run, Hooks(finish=keep(tmp_path)), opened(run), *bests, went_back, ENDED)
    (event,) = told(tmp_path)
    assert event["best_val_loss"] == 2.0 and "val_loss" not in event
    assert event["summary"].endswith("best held-out loss 2.000")


def test_a_folder_may_have_any_name(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9 \xe2\x98\x95") / "demo"
    folder.mkdir(parents=True)
    hear(RunDirectory(folder), Hooks(finish=keep(tmp_path)), ENDED)
    (event,) = told(tmp_path)
    assert event["directory"] == str(folder)


@pytest.mark.parametrize(("state", "told_of"), [(State.STOPPED, 0), (State.FINISHED, 1), (State.FAILED, 1)])
def test_a_stop_is_not_told_where_another_process_goes_on(
    run: RunDirectory, tmp_path: Path, state: State, told_of: int
) -> None:
    mailbox = Mailbox()
    runner = HookRunner(Hooks(finish=keep(tmp_path), failure=keep(tmp_path)), run, mailbox)
    runner.start()
    runner.hold_end()
    runner.settle_end(told=False)
    mailbox.put(RunEnded(state=state, reason="", exit_code=int(state is State.FAILED), step=3))
    assert runner.join(10)
    assert len(told(tmp_path)) == told_of


@pytest.mark.parametrize(("code", "hook"), [(0, "finish"), (1, "failure"), (3, "failure"), (4, "failure")])
def test_the_exit_code_chooses_the_hook(run: RunDirectory, tmp_path: Path, code: int, hook: str) -> None:
    hooks = Hooks(finish=keep(tmp_path), failure=keep(tmp_path))
    hear(run, hooks, RunEnded(state=State.STOPPED, reason="", exit_code=code, step=3))
    assert [event["hook"] for event in told(tmp_path)] == [hook]


def test_a_list_is_run_without_a_shell_and_a_line_has_its_variables(run: RunDirectory, tmp_path: Path) -> None:
    write = "import os, sys; open(sys.argv[1], 'w').write(os.environ['RETENTION_TUI_HOOK'] + sys.argv[2])"
    hooks = Hooks(
        alarm=[sys.executable, "-c", write, f"{tmp_path}/list", "$HOME; *"],
        finish=f'printf "%s" "$RETENTION_TUI_SUMMARY" > {tmp_path}/line',
    )
    hear(run, hooks, Alarm(level="critical", text="a `disk`\n$(is) full\0\x1b[2J"), ENDED)
    assert (tmp_path / "list").read_text() == "alarm$HOME; *"
    assert (tmp_path / "line").read_text() == "demo: finished at step 3: all 3 steps are done"


def test_a_burst_of_alarms_is_told_once_and_then_together(run: RunDirectory, tmp_path: Path) -> None:
    mailbox = Mailbox()
    runner = HookRunner(Hooks(alarm=keep(tmp_path), alarm_pause_seconds=0.8), run, mailbox)
    runner.start()
    mailbox.put(Alarm(level="warning", text="the first"))
    wait_for(lambda: len(told(tmp_path)) == 1)
    for number in range(300):
        mailbox.put(Alarm(level="warning", text=f"alarm {number}"))
    wait_for(lambda: len(told(tmp_path)) == 2)
    mailbox.put(Alarm(level="critical", text="the last"))
    mailbox.put(ENDED)  # what waits is told at the end
    assert runner.join(10)
    first, burst, last = told(tmp_path)
    assert (first["text"], first["earlier"]) == ("the first", [])
    assert (burst["text"], burst["earlier"]) == ("alarm 299", [f"alarm {number}" for number in range(279, 299)])
    assert burst["summary"].endswith("alarm 299 (and 299 more since the last)")
    assert last["text"] == "the last"
    assert "are told together" in run.log_path.read_text()


def wait_for(condition: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("echo no network; exit 7", ["failed: exit code 7", "| no network"]),
        (["/nowhere/ntfy"], ["failed", "/nowhere/ntfy"]),
        ("kill -9 $$", ["failed: ended by SIGKILL"]),
        ("trap '' TERM; echo slow; sleep 60", ["failed: it took longer than 0.5 s and was ended", "| slow"]),
        ("yes", ["failed: it took longer than 0.5 s", "| y"]),
        ("true < /dev/null", ["done in"]),
        (r"printf 'a\033[2Jb\200'", ["done in", "| a [2Jb\ufffd"]),
    ],
    ids=["fails", "missing", "killed", "hangs", "never stops talking", "does not listen", "says what a terminal obeys"],
)
def test_whatever_becomes_of_a_hook_is_a_line_of_the_log(
    run: RunDirectory, command: str | list[str], said: list[str]
) -> None:
    started = time.monotonic()
    log = hear(run, Hooks(finish=command, limit_seconds=0.5), ENDED)
    assert time.monotonic() - started < 4
    assert all(
        f"hook finish{'' if words.startswith('|') else ':'} {words}" in log for words in said if "/" not in words
    )
    assert all(words in log for words in said)
    assert len(log) < 10_000 and "\x1b" not in log


def test_what_a_hook_leaves_behind_is_not_waited_for_and_large_events_arrive() -> None:
    started = time.monotonic()
    assert run_hook("sleep 30 & echo started", b"x" * 1_000_000, {}, 10) == ("", "started\n")
    assert run_hook("wc -c", b"x" * 1_000_000, {}, 10)[1].strip() == "1000000"
    assert time.monotonic() - started < 5


def test_a_run_without_a_folder_any_more_harms_no_hook(tmp_path: Path) -> None:
    hear(RunDirectory(tmp_path / "gone"), Hooks(finish=keep(tmp_path)), ENDED)
    assert len(told(tmp_path)) == 1 and not (tmp_path / "gone").exists()


class TestConfig:
    def test_there_need_not_be_one(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.delenv("RETENTION_TUI_CONFIG")
        monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
        monkeypatch.setenv("HOME", str(tmp_path))
        assert load_config().hooks.commands() == {}

    @pytest.mark.parametrize(
        ("text", "hints"),
        [
            ("[hooks]\nfinsh = 'true'", ["hooks.finsh", "did you mean 'finish'?"]),
            ("[hook]\nfinish = 'true'", ["hook is not known", "did you mean 'hooks'?"]),
            ("hooks = 3", ["hooks"]),
            ("[hooks]\nalarm = true", ["hooks.alarm = True", "should not be true"]),
            ("[hooks]\nalarm = ''", ["hooks.alarm", "a line for the shell, or a list"]),
            ("[hooks]\nalarm = ['ntfy', 3]", ["hooks.alarm", "a line for the shell, or a list"]),
            ("[hooks]\nlimit_seconds = -1", ["hooks.limit_seconds = -1", "greater than 0"]),
            ("[hooks", ["not valid TOML"]),
            ("\xff", ["not UTF-8"]),
        ],
    )
    def test_a_mistake_is_one_line(self, config: Path, text: str, hints: list[str]) -> None:
        config.write_text(text, encoding="latin-1")
        with pytest.raises(UserError) as refusal:
            load_config()
        assert "\n" not in str(refusal.value) and str(config) in str(refusal.value)
        assert all(hint in str(refusal.value) for hint in hints), refusal.value

    def test_a_file_that_was_named_must_be_there(self, config: Path) -> None:
        with pytest.raises(UserError, match="no such file"):
            load_config()

    def test_doctor_shows_it(self, config: Path, tmp_path: Path) -> None:
        config.write_text("[hooks]\nfinish = 'true'\nalarm = 'true'")
        (found,) = [finding for finding in diagnose(tmp_path) if finding.name == "config"]
        assert found.status == "ok" and str(config) in found.value and "finish, alarm" in found.value
        config.write_text("[hooks]\nfinsh = 'true'")
        (found,) = [finding for finding in diagnose(tmp_path) if finding.name == "config"]
        assert found.status == "problem" and "finish" in found.value


class TestTheCommand:
    def start(self, profile: Path, *options: str) -> subprocess.CompletedProcess[str]:
        command = [*COMMAND, "run", str(profile), "--headless", "--runs-dir", "runs", *options]
        return subprocess.run(command, cwd=profile.parent, capture_output=True, text=True, check=False, timeout=60)

    def test_the_process_waits_for_the_hook_of_the_end(self, config: Path, tiny: Path, tmp_path: Path) -> None:
        config.write_text(f'[hooks]\nfinish = "sleep 1; {keep(tmp_path)}; echo told"')
        done = self.start(tiny, "--set", "train.steps=2")
        assert (done.returncode, done.stderr) == (0, "")
        (event,) = told(tmp_path)
        assert event["directory"] == str(tmp_path / "runs" / "tiny")
        assert event["step"] == 2 and event["val_loss"] == event["best_val_loss"] > 0
        log = (tmp_path / "runs" / "tiny" / "log.txt").read_text()
        assert "hook finish | told" in log.splitlines()[-1]

    def test_a_hook_that_fails_is_no_error_of_the_run_and_a_failed_run_is_told(
        self, config: Path, tiny: Path, tmp_path: Path
    ) -> None:
        config.write_text(f'[hooks]\nfinish = "exit 9"\nfailure = "{keep(tmp_path)}"')
        assert self.start(tiny, "--set", "train.steps=1").returncode == 0
        assert told(tmp_path) == []
        assert self.start(tiny, "--set", "data.files=nowhere.txt").returncode == 2
        (event,) = told(tmp_path)
        assert event["state"] == "failed" and "nowhere.txt" in event["reason"]

    def test_a_wrong_file_is_refused_before_anything_is_made(self, config: Path, tiny: Path) -> None:
        config.write_text("[hooks]\nfinsh = 'true'")
        done = self.start(tiny)
        assert done.returncode == 2 and done.stdout == ""
        assert "did you mean 'finish'?" in done.stderr and done.stderr.count("\n") == 1
        assert not (tiny.parent / "runs").exists()

    def test_a_profile_brings_no_hooks(self, config: Path, tiny: Path) -> None:
        config.touch()
        tiny.write_text(f"{tiny.read_text()}\n[hooks]\nfinish = 'touch {tiny.parent}/pwned'\n")
        done = self.start(tiny)
        assert done.returncode == 2 and "hooks" in done.stderr
        assert not (tiny.parent / "pwned").exists()
