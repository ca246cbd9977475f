"""The real command in a real pseudo-terminal, which is resized, frozen and taken away; and without one, signalled."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from windows import COMMAND, ENTER_SCREEN, LEAVE_SCREEN, Window, wait_for

from engine.store import RunDirectory
from retention_tui.visits import last_look

FOR_EVER = 1_000_000
SMALLER = ["model.layers=1", "model.heads=1", "train.batch_size=4", "validate.every=0", "checkpoint.every=0"]
NOISE = b"a library says hello"
NOISY = f"""
import os, sys, threading, time
def chatter():
    while True:
        os.write(1, {NOISE!r} + b" (1)\\n")
        os.write(2, {NOISE!r} + b" (2)\\n")
        print({NOISE.decode()!r}, "(print)", flush=True)
        print({NOISE.decode()!r}, "(bar)", end="\\r", file=sys.stderr)
        time.sleep(0.05)
threading.Thread(target=chatter, daemon=True).start()
"""


class Runs:
    """Starts the tiny profile over and over, each time as a new run."""

    def __init__(self, profile: Path) -> None:
        self._profile, self._folder = profile, profile.parent / "runs"
        self._variables = {"HOME": str(profile.parent), "OPENBLAS_NUM_THREADS": "1"}
        self.opened: list[Window] = []
        self.started: list[subprocess.Popen[bytes]] = []

    @property
    def run(self) -> RunDirectory:
        return RunDirectory(self._folder / "tiny")

    def command(self, steps: int, *options: str) -> list[str]:
        settings = [f"train.steps={steps}", *SMALLER]
        sets = [word for setting in settings for word in ("--set", setting)]
        return [*COMMAND, "run", str(self._profile), *sets, "--runs-dir", str(self._folder), *options]

    def window(self, steps: int = FOR_EVER, *options: str, **environment: str) -> Window:
        """A window in which the run trains."""
        window = Window(*self.command(steps, *options), **self._variables, **environment)
        self.opened.append(window)
        if "--headless" not in options:
            wait_for(lambda: ENTER_SCREEN in window.output or window.process.poll() is not None, "screen")
            assert window.process.poll() is None, window.output.decode()
        self.wait_for_step(5)
        return window

    def piped(self, steps: int = FOR_EVER, *options: str) -> subprocess.Popen[bytes]:
        """The run without a terminal, training."""
        process = self.begin(steps, *options)
        self.wait_for_step(5)
        return process

    def begin(self, steps: int, *options: str) -> subprocess.Popen[bytes]:
        """The run without a terminal, from its very first moment."""
        process = subprocess.Popen(
            self.command(steps, *options),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, **self._variables},
        )
        self.started.append(process)
        return process

    def step(self) -> int:
        last = self.run.last("loss") if self.run.database_path.exists() else None
        return last[0] if last else 0

    def wait_for_step(self, step: int) -> None:
        wait_for(lambda: self.step() >= step, f"step {step}")

    @property
    def log(self) -> str:
        return self.run.log_path.read_text(encoding="utf-8")

    def has_checkpoint_of_the_end(self) -> bool:
        return (self.run.checkpoints_path / f"step-{self.step():07}" / "state.json").is_file()


@pytest.fixture
def runs(tiny: Path) -> Iterator[Runs]:
    runs = Runs(tiny)
    yield runs
    for window in runs.opened:
        window.process.kill()
        window.process.wait()
        window.close()
    for process in runs.started:
        process.kill()
        process.communicate()


class TestInATerminal:
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_a_signal_stops_with_a_checkpoint_and_restores_the_terminal(
        self, runs: Runs, number: signal.Signals
    ) -> None:
        window = runs.window()
        assert not window.is_restored()
        window.process.send_signal(number)
        assert window.exit_code() == 128 + number
        assert window.is_restored()
        assert runs.has_checkpoint_of_the_end()
        assert runs.run.summary().state == "stopped"
        assert window.shows(f"stopped by {number.name}".encode(), since=window.output.rfind(LEAVE_SCREEN))

    def test_more_signals_while_stopping_change_nothing(self, runs: Runs) -> None:
        window = runs.window()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
            window.process.send_signal(number)
            time.sleep(0.02)
        assert window.exit_code() == 128 + signal.SIGTERM
        assert window.is_restored()
        assert runs.has_checkpoint_of_the_end()
        assert b"Traceback" not in window.output
        assert "Traceback" not in runs.log

    def test_a_signal_stops_also_where_nobody_reads_the_terminal(self, runs: Runs) -> None:
        window = runs.window()
        window.freeze()
        for columns in range(120, 160):  # each is drawn anew, until the terminal takes no more
            window.resize(columns, 40)
            time.sleep(0.03)
        window.process.send_signal(signal.SIGTERM)
        assert window.exit_code() == 128 + signal.SIGTERM
        assert runs.has_checkpoint_of_the_end()

    def test_ctrl_c_and_q_ask_and_s_stops(self, runs: Runs) -> None:
        window = runs.window()
        window.type(b"\x03")
        wait_for(lambda: window.shows(b"Stop and quit"), "question")
        window.type(b"\x1b")
        time.sleep(0.3)
        here = len(window.output)
        window.type(b"q")
        wait_for(lambda: window.shows(b"Stop and quit", since=here), "question")
        assert runs.run.is_live()
        window.type(b"s")
        assert window.exit_code() == 0
        assert window.is_restored()
        assert runs.has_checkpoint_of_the_end()
        assert window.shows(b"stopped at step", since=window.output.rfind(LEAVE_SCREEN))

    def test_leaving_the_screen_goes_on_in_lines_even_from_a_pause(self, runs: Runs) -> None:
        window = runs.window(steps=150)
        window.type(b" ")
        wait_for(lambda: runs.run.summary().state == "paused", "pause")
        window.type(b"q")
        wait_for(lambda: window.shows(b"Leave the screen"), "question")
        window.type(b"l")
        assert window.exit_code() == 0
        assert window.is_restored()
        left = window.output.rfind(LEAVE_SCREEN)
        assert window.shows(b"goes on here without its screen", since=left)
        assert window.shows(b"Iter 150: Train loss", since=left)
        assert runs.run.summary().state == "finished"

    def test_follows_the_size_of_the_window(self, runs: Runs) -> None:
        window = runs.window()
        wait_for(lambda: window.lowest_line(0) == 24, "full screen")
        for columns, lines in ((20, 5), (90, 30)):
            window.resize(columns, lines)
            time.sleep(0.4)
            here = len(window.output)
            time.sleep(0.5)
            assert window.lowest_line(here) <= lines
        wait_for(lambda: window.lowest_line(here) > 5, "large screen")
        window.process.send_signal(signal.SIGTERM)
        assert window.exit_code() == 128 + signal.SIGTERM
        assert window.is_restored()

    def test_can_be_suspended(self, runs: Runs) -> None:
        window = runs.window()
        window.process.send_signal(signal.SIGTSTP)
        wait_for(window.is_restored, "terminal given back")
        here = len(window.output)
        window.process.send_signal(signal.SIGCONT)
        wait_for(lambda: ENTER_SCREEN in window.output[here:], "screen")
        window.process.send_signal(signal.SIGTERM)
        assert window.exit_code() == 128 + signal.SIGTERM
        assert window.is_restored()

    def test_what_libraries_print_goes_to_the_log_and_never_to_the_screen(self, runs: Runs, tmp_path: Path) -> None:
        (tmp_path / "noisy").mkdir()
        (tmp_path / "noisy" / "sitecustomize.py").write_text(NOISY)
        window = runs.window(PYTHONPATH=str(tmp_path / "noisy"))
        ways = ("(1)", "(2)", "(print)", "(bar)")
        before = [runs.log.count(way) for way in ways]
        wait_for(lambda: min(runs.log.count(way) - old for way, old in zip(ways, before, strict=True)) >= 5, "log")
        window.process.send_signal(signal.SIGTERM)
        assert window.exit_code() == 128 + signal.SIGTERM
        screen = window.output[window.output.find(ENTER_SCREEN) : window.output.rfind(LEAVE_SCREEN)]
        assert NOISE in window.output[: window.output.find(ENTER_SCREEN)]
        assert NOISE not in screen


class TestTheLauncher:
    @pytest.fixture
    def window(self, tmp_path: Path) -> Iterator[Window]:
        window = Window(*COMMAND, "--runs-dir", str(tmp_path / "runs"), HOME=str(tmp_path))
        wait_for(lambda: window.shows(b"retention-tiny"), "list of profiles")
        yield window
        window.process.kill()
        window.process.wait()
        window.close()

    def test_a_signal_ends_it(self, window: Window) -> None:
        window.process.send_signal(signal.SIGTERM)
        assert window.exit_code() == 128 + signal.SIGTERM
        assert window.is_restored()

    def test_it_ends_with_its_window_and_what_happened_is_still_news(self, window: Window, tmp_path: Path) -> None:
        window.close()
        assert window.process.wait(30) == 0
        assert last_look(tmp_path / "runs") < time.time() - 3600

    def test_what_was_there_when_one_left_is_no_news(self, window: Window, tmp_path: Path) -> None:
        before = time.time()
        window.type(b"q")
        assert window.exit_code() == 0
        assert before - 60 <= last_look(tmp_path / "runs") <= time.time()


class TestLoss:
    def test_a_closed_window_does_not_end_the_run(self, runs: Runs) -> None:
        window = runs.window(steps=200)
        window.close()
        lost_at = runs.step()
        assert window.process.wait(30) == 0
        assert runs.run.summary().state == "finished"
        assert lost_at < runs.step() == 200
        assert "finished at step 200" in runs.log
        assert runs.has_checkpoint_of_the_end()

    def test_a_window_that_is_closed_while_nobody_reads(self, runs: Runs) -> None:
        window = runs.window(steps=200)
        window.freeze()
        for columns in range(120, 160):
            window.resize(columns, 40)
            time.sleep(0.02)
        window.close()
        assert window.process.wait(30) == 0
        assert runs.run.summary().state == "finished"

    def test_a_run_lost_while_a_question_is_open_can_still_be_stopped(self, runs: Runs) -> None:
        window = runs.window()
        window.type(b"q")
        wait_for(lambda: window.shows(b"Stop and quit"), "question")
        window.close()
        lost_at = runs.step()
        runs.wait_for_step(lost_at + 20)
        window.process.send_signal(signal.SIGTERM)
        assert window.process.wait(30) == 128 + signal.SIGTERM
        assert runs.has_checkpoint_of_the_end()

    def test_a_hangup_sent_by_hand_takes_the_screen_and_leaves_the_run(self, runs: Runs) -> None:
        window = runs.window(steps=150)
        window.process.send_signal(signal.SIGHUP)
        wait_for(window.is_restored, "terminal given back")
        assert window.exit_code() == 0
        assert "finished at step 150" in runs.log
        assert window.shows(b"Iter 150: Train loss", since=window.output.rfind(LEAVE_SCREEN))

    def test_a_closed_window_does_not_end_a_headless_run(self, runs: Runs) -> None:
        window = runs.window(150, "--headless")
        window.close()
        assert window.process.wait(30) == 0
        assert "finished at step 150" in runs.log


class TestHeadless:
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_a_signal_stops_with_a_checkpoint(self, runs: Runs, number: signal.Signals) -> None:
        process = runs.piped()
        process.send_signal(number)
        process.send_signal(number)
        output, errors = process.communicate(timeout=30)
        assert process.returncode == 128 + number
        assert errors == b""
        assert f"stopped by {number.name}" in output.decode().splitlines()[-1]
        assert runs.has_checkpoint_of_the_end()

    def test_a_hangup_changes_nothing(self, runs: Runs) -> None:
        process = runs.piped(150, "--json")
        process.send_signal(signal.SIGHUP)
        output, _ = process.communicate(timeout=30)
        assert process.returncode == 0
        events = [json.loads(line) for line in output.decode().splitlines()]
        assert [event["step"] for event in events if event["event"] == "step"] == list(range(1, 151))
        assert events[-1]["event"] == "run_ended" and events[-1]["state"] == "finished"

    def test_a_closed_pipe_does_not_end_the_run(self, runs: Runs) -> None:
        process = runs.piped(150, "--json")
        assert process.stdout is not None
        process.stdout.close()
        process.stdout = None
        _, errors = process.communicate(timeout=30)
        assert process.returncode == 0
        assert errors == b""
        assert runs.run.summary().state == "finished"

    def test_a_reader_that_stalls_holds_up_neither_the_run_nor_its_end(self, runs: Runs) -> None:
        process = runs.piped(FOR_EVER, "--json")
        assert process.stdout is not None
        pipe = process.stdout.fileno()
        wait_for(lambda: struct.unpack("i", fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)))[0] > 40_000, "full pipe")
        runs.wait_for_step(runs.step() + 100)
        process.send_signal(signal.SIGTERM)
        assert process.wait(15) == 128 + signal.SIGTERM
        assert runs.has_checkpoint_of_the_end()
        lines = process.stdout.read().decode().splitlines()
        steps = [event["step"] for event in map(json.loads, lines[:-1]) if event["event"] == "step"]
        assert steps == list(range(1, len(steps) + 1)), "in order up to where the reader stalled"
        assert len(steps) < runs.step()

    def test_a_signal_before_training_ends_at_once(self, runs: Runs) -> None:
        process = runs.begin(FOR_EVER)
        wait_for(runs.run.log_path.exists, "run")
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
        assert process.returncode == 128 + signal.SIGINT
        assert errors == b""
