"""Leave and come back: runs in processes of their own, watched and steered from other terminals, by real keys."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pytest
from test_tui_app import click_on, seen, step_shown, until
from textual.widgets import Input
from windows import COMMAND, ENTER_SCREEN, LEAVE_SCREEN, Window, wait_for

from engine.commands import Generate, Pause, Resume, Set, Stop
from engine.control_socket import read_address
from engine.errors import UserError
from engine.events import AnswerEnded, AnswerStarted, Event, Notice, State, StateChanged, StepCompleted
from engine.runs import list_runs
from engine.store import RunDirectory
from retention_tui import attend, watch
from retention_tui.app import RetentionApp
from retention_tui.client import Reconnected
from retention_tui.remote import RemoteClient
from retention_tui.screens.launcher import Launcher
from retention_tui.screens.run import RunScreen
from retention_tui.session import Session
from retention_tui.web import serve

FOR_EVER = 1_000_000
SMALL = ["model.layers=1", "train.batch_size=4", "validate.every=0", "checkpoint.every=0"]


class Elsewhere:
    """Runs of the tiny profile in processes of their own, and windows and programs that look at them."""

    def __init__(self, profile: Path) -> None:
        self.profile, self.folder = profile, profile.parent / "runs"
        self._windows: list[Window] = []
        self._programs: list[subprocess.Popen[str]] = []

    def words(self, *arguments: str) -> list[str]:
        return [*COMMAND, *arguments, "--runs-dir", str(self.folder)]

    def run_words(self, *options: str, steps: int = FOR_EVER) -> list[str]:
        settings = [word for setting in (f"train.steps={steps}", *SMALL) for word in ("--set", setting)]
        return self.words("run", str(self.profile), *settings, *options)

    def begin(self, name: str | None = None) -> RunDirectory:
        """Starts a run in the background and comes back once it has opened."""
        settings = [f"train.steps={FOR_EVER}", *SMALL]
        return Session(self.folder).start_in_background(str(self.profile), settings, name).run

    def ask(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self.words(*arguments), capture_output=True, text=True, check=False, timeout=60)

    def window(self, words: list[str]) -> Window:
        window = Window(*words, HOME=str(self.profile.parent))
        self._windows.append(window)
        wait_for(lambda: ENTER_SCREEN in window.output or window.process.poll() is not None, "screen")
        return window

    def program(self, *arguments: str) -> subprocess.Popen[str]:
        return self.begin_program(self.words(*arguments))

    def begin_program(self, words: list[str], folder: Path | None = None) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        program = subprocess.Popen(words, stdout=pipe, stderr=pipe, text=True, cwd=folder)
        self._programs.append(program)
        return program

    def end(self) -> None:
        for summary in list_runs(self.folder):
            if summary.live and (address := read_address(RunDirectory(summary.path))) and address.pid != os.getpid():
                os.kill(address.pid, signal.SIGKILL)
        for program in self._programs:
            program.kill()
            program.communicate()
        for window in self._windows:
            window.process.kill()
            window.process.wait()
            window.close()


@pytest.fixture
def elsewhere(tiny: Path) -> Iterator[Elsewhere]:
    elsewhere = Elsewhere(tiny)
    yield elsewhere
    elsewhere.end()


@pytest.fixture(scope="module")
def live(shared_tiny: Path) -> Iterator[Elsewhere]:
    """With a run `tiny` that trains for ever, for tests that leave it as it is."""
    elsewhere = Elsewhere(shared_tiny)
    elsewhere.begin()
    yield elsewhere
    elsewhere.end()


@pytest.fixture
def run(live: Elsewhere) -> RunDirectory:
    return RunDirectory(live.folder / "tiny")


@pytest.fixture
def session(elsewhere: Elsewhere) -> Iterator[Session]:
    session = Session(elsewhere.folder)
    yield session
    session.stop("the test is over")
    session.finish()


def step(run: RunDirectory) -> int:
    last = run.last("loss")
    return last[0] if last else 0


def state(run: RunDirectory) -> str:
    return run.summary().state


class TestBackground:
    def test_it_has_a_session_of_its_own_and_leaves_no_pipe_behind(self, run: RunDirectory) -> None:
        address = read_address(run)
        assert address is not None
        assert os.getsid(address.pid) == address.pid != os.getsid(0)
        opened = Path(f"/proc/{address.pid}/fd")
        if opened.is_dir():  # Linux shows what it has open
            wait_for(lambda: (opened / "1").resolve() == run.log_path, "log as its output")
            assert (opened / "0").resolve() == Path(os.devnull)
            assert (opened / "2").resolve() == run.log_path

    def test_a_start_that_fails_is_one_line_and_its_exit_code(self, elsewhere: Elsewhere) -> None:
        done = elsewhere.ask("run", str(elsewhere.profile), "--set", "data.files=nowhere", "--background")
        assert done.returncode == 2
        assert re.fullmatch(r"retention-tui: data\.files: \S+/nowhere: no such file or folder\n", done.stderr)
        assert list_runs(elsewhere.folder) == []

    def test_a_start_that_is_given_up_leaves_nothing(self, elsewhere: Elsewhere) -> None:
        run = RunDirectory(elsewhere.folder / "gone")
        program = elsewhere.begin_program(elsewhere.run_words("--name", "gone", "--background", "--headless"))
        wait_for(run.identity_path.exists, "folder of the run")
        program.send_signal(signal.SIGINT)
        said, complaints = program.communicate(timeout=30)
        assert (said, program.returncode) == ("", 130)
        if complaints != "retention-tui: given up; nothing was started\n":  # it had got further
            assert re.match(r"retention-tui: given up; run gone is not live: it was stopped at step \d", complaints)
            assert step(run) > 0
        else:
            assert not run.path.exists()
        assert not run.is_live()

    def test_a_run_that_cannot_be_launched_leaves_the_session_free(self, session: Session, tiny: Path) -> None:
        def no_log(run: RunDirectory) -> None:
            raise PermissionError(13, "Permission denied", str(run.log_path))

        session.on_launch = no_log
        with pytest.raises(UserError, match="run once cannot be started: Permission denied"):
            session.start(str(tiny), ["train.steps=2"], "once")
        assert session.client is None and not session.running and session.finish() == 0
        session.on_launch = lambda run: None
        session.start(str(tiny), ["train.steps=2"], "once")
        assert session.finish() == 0


class TestWatch:
    def test_two_windows_show_and_steer_one_run_which_outlives_both(self, elsewhere: Elsewhere) -> None:
        first = elsewhere.window(elsewhere.run_words("--background"))
        wait_for(lambda: first.shows(b"training"), "screen of the run that it started")
        run = RunDirectory(elsewhere.folder / "tiny")
        second = elsewhere.window(elsewhere.words("watch", "tiny"))
        wait_for(lambda: second.shows(b"training"), "the same in the other window")
        second.type(b" ")
        wait_for(lambda: state(run) == "paused" and first.shows(b"paused"), "pause, in the other window too")
        first.type(b" ")
        wait_for(lambda: state(run) == "training", "progress")
        first.close()
        assert first.process.wait(30) == 0
        lost_at = step(run)
        wait_for(lambda: step(run) > lost_at + 10, "progress without its first window")
        second.type(b"q")
        assert second.exit_code() == 0 and second.is_restored()
        assert second.shows(b"tiny goes on, process ", since=second.output.rfind(LEAVE_SCREEN))
        done = elsewhere.ask("control", "tiny", "stop")
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == f"tiny: stopped at step {step(run)}: stopped on request\n"
        wait_for(lambda: not run.is_live(), "end")
        assert (run.checkpoints_path / f"step-{step(run):07}" / "state.json").is_file()
        assert read_address(run) is None
        assert "Traceback" not in run.log_path.read_text()

    def test_a_killed_run_is_told_in_words_and_can_be_resumed(self, elsewhere: Elsewhere) -> None:
        run = elsewhere.begin()
        lines = elsewhere.program("watch", "tiny")
        window = elsewhere.window(elsewhere.words("watch", "tiny"))
        wait_for(lambda: window.shows(b"training"), "run")
        assert lines.stdout is not None and lines.stderr is not None
        assert lines.stdout.readline() == "loading: data and model\n"
        address = read_address(run)
        assert address is not None
        os.kill(address.pid, signal.SIGKILL)
        wait_for(lambda: window.shows(b"interrupted"), "word for it")
        window.type(b"q")
        words = f"tiny was interrupted: process {address.pid} is gone; retention-tui resume tiny goes on with it"
        assert window.exit_code() == 2
        assert window.shows(words.encode(), since=window.output.rfind(LEAVE_SCREEN))
        assert b"Traceback" not in window.output
        assert (lines.stderr.read(), lines.wait(30)) == (f"retention-tui: {words}\n", 2)
        words = r"tiny is not live: it was interrupted at step \d+; retention-tui resume tiny goes on with it"
        with pytest.raises(UserError, match=words):
            RemoteClient(run)
        assert (run.path / "control.sock").is_socket(), "it is left behind"
        again = RemoteClient(Session(elsewhere.folder).resume_in_background("tiny").run)
        assert again.pid not in (address.pid, os.getpid())
        again.close()

    def test_a_run_under_its_own_screen_is_served_also_once_its_terminal_is_gone(self, elsewhere: Elsewhere) -> None:
        window = elsewhere.window(elsewhere.run_words())
        run = RunDirectory(elsewhere.folder / "tiny")
        wait_for(lambda: run.database_path.exists() and step(run) > 3, "progress")
        client = RemoteClient(run)
        client.send(Pause())
        wait_for(lambda: window.shows(b"paused"), "pause on its own screen")
        window.close()
        wait_for(lambda: state(run) == "training", "progress: nobody is left at its screen to go on with it")
        assert client.alive
        client.send(Stop())
        assert window.process.wait(30) == 0
        wait_for(lambda: client.ended, "end")
        assert client.ended is not None and client.ended.reason == "stopped on request"

    def test_a_reader_that_is_suspended_hears_the_end_once_it_goes_on(self, elsewhere: Elsewhere) -> None:
        run = elsewhere.begin()
        lines = elsewhere.program("watch", "tiny", "--json")
        assert lines.stdout is not None and lines.stderr is not None
        while json.loads(lines.stdout.readline())["event"] != "step":
            pass
        lines.send_signal(signal.SIGSTOP)
        client, told = RemoteClient(run), 0
        for _ in range(1_500):  # more than what the system keeps for a reader that does not read
            client.send(Set("nothing.such", "x" * 900))
        while told < 1_500:
            told += sum(isinstance(event, Notice) for event in client.events(1.0))
        client.send(Stop(reason="that was it"))
        wait_for(lambda: not run.is_live(), "end")
        lines.send_signal(signal.SIGCONT)
        said, complaints = lines.communicate(timeout=30)
        ended = json.loads(said.splitlines()[-1])
        assert (ended["event"], ended["state"], ended["reason"]) == ("run_ended", "stopped", "that was it")
        assert sum("nothing.such" in line for line in said.splitlines()) < 1_500, "else the system kept it all"
        assert (lines.returncode, complaints) == (0, "")
        words = r"run tiny is not live: it was stopped at step \d+; retention-tui resume tiny goes on with it"
        with pytest.raises(UserError, match=words):
            RemoteClient(run)

    def test_a_run_is_steered_from_another_folder_than_it_was_started_in(self, elsewhere: Elsewhere) -> None:
        folder = elsewhere.profile.parent / "work"
        folder.mkdir()
        settings = [word for setting in (f"train.steps={FOR_EVER}", *SMALL) for word in ("--set", setting)]
        words = [*COMMAND, "run", str(elsewhere.profile), *settings, "--name", "there", "--headless"]
        program = elsewhere.begin_program(words, folder)
        assert program.stdout is not None and program.stdout.readline()
        assert watch.control(folder / "runs", "there", "stop", None) == 0
        assert program.wait(30) == 0


class TestControl:
    def test_each_command_says_what_came_of_it(self, live: Elsewhere, capsys: pytest.CaptureFixture[str]) -> None:
        def control(action: str, setting: str | None = None) -> str:
            assert watch.control(live.folder, "tiny", action, setting) == 0
            (line,) = capsys.readouterr().out.splitlines()
            return line

        assert control("pause") == "tiny: paused"
        assert control("pause") == "tiny is paused already"
        assert re.fullmatch(r"tiny: Iter \d+: checkpoint saved to \S+ \(0\.\d MB\)", control("checkpoint"))
        assert re.fullmatch(r"tiny: step \d+ has been saved already", control("checkpoint"))
        assert re.fullmatch(r"tiny: Iter \d+: Val loss .*", control("validate"))
        assert control("resume") == "tiny: goes on"
        assert re.fullmatch(
            r"tiny: train\.learning_rate = 1e-4 from step [\d,]+ on\b.*", control("set", "train.learning_rate=1e-4")
        )
        with pytest.raises(UserError, match=r"tiny: not changed: train\.learning_rate.* should be a number"):
            watch.control(live.folder, "tiny", "set", "train.learning_rate=fast")
        with pytest.raises(UserError, match=r"model\.width cannot be changed"):
            watch.control(live.folder, "tiny", "set", "model.width=8")

    @pytest.mark.parametrize(
        ("action", "setting", "reason"),
        [
            ("fly", None, "control cannot 'fly'; it can pause, resume"),
            ("set", None, "needs KEY=VALUE"),
            ("set", "train.steps", "needs KEY=VALUE"),
            ("stop", "now", "takes nothing more"),
        ],
    )
    def test_wrong_words_are_one_line(self, tmp_path: Path, action: str, setting: str | None, reason: str) -> None:
        with pytest.raises(UserError, match=re.escape(reason)):
            watch.control(tmp_path, "tiny", action, setting)


class TestOnTheScreen:
    async def test_a_run_moves_to_the_background_and_loses_not_a_step(
        self, session: Session, elsewhere: Elsewhere
    ) -> None:
        settings = [f"train.steps={FOR_EVER}", *SMALL]
        client = session.start(str(elsewhere.profile), settings, "moved")
        app = RetentionApp(session, client)
        async with app.run_test(size=(130, 40)) as pilot:
            await until(pilot, lambda: step_shown(app) > 5)
            app.simulate_key("b")
            await until(pilot, lambda: "Background" not in seen(app))
            assert session.client is None and session.background is not None
            went_on_at = client.run.attempts()[-1].from_step
            await until(pilot, lambda: step_shown(app) > went_on_at + 10)
            app.simulate_key("s")
            await until(pilot, lambda: "Stop moved?" in seen(app))
            app.simulate_key("s")
            await until(pilot, lambda: "● stopped" in seen(app))
            assert session.background.pid != os.getpid()
            app.simulate_key("3")
            await until(pilot, lambda: re.search(r"moved goes on at step \d+", seen(app)))
            assert "it goes on in the background; leaving this screen leaves it alone" in seen(app)
            assert seen(app).count("moved starts on") == 1
            app.simulate_key("q")
            await until(pilot, lambda: not app.is_running)
        steps, losses = client.run.curve("loss")
        assert steps.tolist() == list(range(1, len(steps) + 1)) and len(steps) > went_on_at + 5
        alone = session.start(str(elsewhere.profile), settings, "alone").run
        wait_for(lambda: step(alone) >= len(steps), "other run")
        assert losses.tolist() == alone.curve("loss")[1].tolist()[: len(losses)]
        assert [attempt.id for attempt in client.run.attempts()] == [1, 2]

    async def test_where_the_background_fails_one_is_told_how_to_go_on(
        self,
        session: Session,
        elsewhere: Elsewhere,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        client = session.start(str(elsewhere.profile), [f"train.steps={FOR_EVER}", *SMALL])
        app = RetentionApp(session, client)
        async with app.run_test(size=(160, 40)) as pilot:
            await until(pilot, lambda: step_shown(app) > 5)
            monkeypatch.setattr(sys, "executable", "/nowhere/python")
            app.simulate_key("b")
            await until(pilot, lambda: "retention-tui resume tiny goes on with it" in seen(app))
            assert "not in the background: no process could be started" in seen(app)
            assert "● stopped" in seen(app)
            app.simulate_key("q")
            await until(pilot, lambda: not app.is_running)
        assert client.run.checkpoints_path.is_dir() and not client.run.is_live()
        assert attend.finish(session) == 2, "who left meanwhile is told"
        assert "not in the background: no process could be started" in capsys.readouterr().err

    async def test_the_launcher_starts_in_the_background_and_watches_what_is_live(
        self, session: Session, elsewhere: Elsewhere, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        text = elsewhere.profile.read_text().replace("steps = 12", f"steps = {FOR_EVER}")
        elsewhere.profile.write_text(text)
        monkeypatch.setenv("RETENTION_TUI_PROFILES", str(elsewhere.profile.parent))
        app = RetentionApp(session)
        async with app.run_test(size=(130, 40)) as pilot:
            await until(pilot, lambda: "your own" in seen(app))
            await click_on(pilot, "tiny")
            app.simulate_key("b")
            await until(pilot, lambda: isinstance(app.screen, RunScreen) and step_shown(app) > 3)
            app.simulate_key("q")
            await until(pilot, lambda: isinstance(app.screen, Launcher) and "Refresh" in seen(app))
            assert not session.running
            await click_on(pilot, "tiny")
            await until(pilot, lambda: "Enter Watch" in seen(app))
            left_at = step(RunDirectory(elsewhere.folder / "tiny"))
            app.simulate_key("enter")
            await until(pilot, lambda: isinstance(app.screen, RunScreen) and step_shown(app) > left_at)
            app.simulate_key("s")
            await until(pilot, lambda: "Stop tiny?" in seen(app))
            app.simulate_key("s")
            await until(pilot, lambda: "● stopped" in seen(app))
            app.simulate_key("q")
            await until(pilot, lambda: isinstance(app.screen, Launcher))
            app.simulate_key("q")
            await until(pilot, lambda: not app.is_running)

    async def test_who_looks_only_sees_all_and_changes_nothing(self, session: Session, run: RunDirectory) -> None:
        said = len(run.events())
        client = RemoteClient(run, looks_only=True)
        app = RetentionApp(session, client)
        async with app.run_test(size=(130, 40)) as pilot:
            await until(pilot, lambda: "looking only" in seen(app) and step_shown(app) > 3)
            for key in ("space", "c", "v", "s", "b"):
                app.simulate_key(key)
            here = step_shown(app)
            await until(pilot, lambda: step_shown(app) > here + 5)
            app.simulate_key("2")
            await until(pilot, lambda: "this screen may only look" in seen(app))
            client.send(Stop())  # as a screen that does not keep to it
            await until(pilot, lambda: "refused: stop: this watcher may only look" in seen(app))
            app.simulate_key("escape")
            app.simulate_key("q")
            await until(pilot, lambda: not app.is_running)
        assert state(run) == "training"
        assert not {event["event"] for event in run.events()[said:]} & {"state", "checkpoint", "validation"}

    def test_a_broken_connection_is_made_again(self, run: RunDirectory) -> None:
        """As for a watcher that was suspended for so long that it was dropped."""
        client, heard = RemoteClient(run), list[Event]()

        def hears(kind: type[Event], state: State | None = None) -> bool:
            heard.extend(client.events())
            return any(isinstance(event, kind) and state in (None, getattr(event, "state", None)) for event in heard)

        client.send(Generate("long", "A list is", max_tokens=100_000))
        wait_for(lambda: hears(AnswerStarted), "answer")
        heard.clear()
        client._connection.close()
        client.send(Pause())
        wait_for(lambda: hears(StateChanged, State.PAUSED), "pause: no command is lost")
        assert [event.reason for event in heard if isinstance(event, AnswerEnded)] == ["connection lost"]
        assert hears(Reconnected)
        heard = [event for event in heard if not isinstance(event, StateChanged)]
        client.send(Resume())
        wait_for(lambda: hears(StateChanged, State.TRAINING), "progress")
        assert client.alive
        steps = [event.step for event in heard if isinstance(event, StepCompleted)]
        assert steps == sorted(set(steps)), "nothing is told twice"
        client.close()

    def test_a_refused_question_is_answered_by_its_refusal(self, run: RunDirectory) -> None:
        client = RemoteClient(run, looks_only=True)
        client.send(Generate("mine", "A list is"))
        heard: list[Event] = []
        wait_for(lambda: heard.extend(client.events()) or any(isinstance(event, AnswerEnded) for event in heard), "end")
        (ended,) = [event for event in heard if isinstance(event, AnswerEnded)]
        assert (ended.answer, ended.reason) == ("mine", "refused: generate: this watcher may only look")
        client.close()

    async def test_escape_pressed_twice_leaves_an_answer_that_does_not_end(
        self, session: Session, run: RunDirectory
    ) -> None:
        client = RemoteClient(run)
        app = RetentionApp(session, client)
        async with app.run_test(size=(130, 40)) as pilot:
            client.send(Pause())
            await until(pilot, lambda: "● paused" in seen(app))
            os.kill(client.pid, signal.SIGSTOP)  # it hears nothing
            try:
                await pilot.press("2", "a", "enter", "escape")
                assert isinstance(app.focused, Input)
                await pilot.press("escape")
                assert app.focused is None
            finally:
                os.kill(client.pid, signal.SIGCONT)
            client.send(Resume())
            await until(pilot, lambda: "● training" in seen(app))


def test_what_the_browser_needs_is_said_where_it_is_not_there(live: Elsewhere, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "textual_serve.server", None)
    with pytest.raises(UserError, match=re.escape("pip install 'retention-tui[web]'")):
        serve(live.folder, "tiny", "127.0.0.1", 8000)


def test_what_means_nothing_to_a_browser_is_refused(live: Elsewhere) -> None:
    done = live.ask("watch", "tiny", "--web", "--json")
    words = "retention-tui: watch --web is for looking only anyway, and takes no --look, --headless or --json\n"
    assert (done.returncode, done.stderr) == (2, words)


async def test_a_browser_may_look_and_that_is_all(live: Elsewhere, run: RunDirectory) -> None:
    said = len(run.events())
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    server = live.program("watch", "tiny", "--web", "--port", f"{port}")
    assert server.stdout is not None
    page, shown = f"http://127.0.0.1:{port}", bytearray()
    line = await asyncio.to_thread(server.stdout.readline)
    assert line == f"tiny, for looking only, at {page}; Ctrl+C ends this, and not the run\n"
    async with aiohttp.ClientSession() as browser:
        for origin in ("http://elsewhere.example", "http://127.0.0.1:1"):
            with pytest.raises(aiohttp.WSServerHandshakeError):
                await browser.ws_connect(f"{page}/ws", headers={"Origin": origin})
        async with browser.get(page) as answer:
            assert f"ws://127.0.0.1:{port}/ws" in await answer.text()
        async with browser.ws_connect(f"{page}/ws?width=130&height=40", headers={"Origin": page}) as terminal:
            while not re.search(rb"training.+looking only", re.sub(rb"\x1b\[[0-9;?]*[A-Za-z]", b"", bytes(shown))):
                shown += await terminal.receive_bytes(timeout=30)
            for keys in (" ", "c", "s", "s"):
                await terminal.send_json(["stdin", keys])
                shown += await terminal.receive_bytes(timeout=30)
            await terminal.send_json(["resize", {"width": 10**9, "height": 10**9}])
            here = step(run)
            await asyncio.to_thread(wait_for, lambda: step(run) > here + 10, "progress")
            assert not {event["event"] for event in run.events()[said:]} & {"state", "checkpoint", "validation"}
            began = time.monotonic()
            server.send_signal(signal.SIGINT)  # with a page open that does not answer
            assert await asyncio.to_thread(server.wait, 30) == 0
            assert time.monotonic() - began < 8
    assert run.is_live()
