"""The app as a person uses it, by keys and mouse, with the real engine training beneath it."""

from __future__ import annotations

import asyncio
import html
import json
import os
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from textual.app import App
from textual.pilot import Pilot
from textual.widgets import Input, OptionList

from engine.events import State
from engine.runs import RunLock, list_runs
from engine.store import RunDirectory
from retention_tui.app import RetentionApp
from retention_tui.screens.launcher import Launcher
from retention_tui.screens.quit import Question
from retention_tui.screens.run import RunScreen
from retention_tui.screens.setting import SettingQuestion
from retention_tui.session import Session
from retention_tui.story import while_away
from retention_tui.visits import last_look, remember_look
from retention_tui.widgets.chart import Chart

ENDLESS = ["train.steps=1000000", "validate.every=0", "checkpoint.every=0", "train.schedule='constant'"]


@pytest.fixture(autouse=True)
def _impatient_pilot(monkeypatch: pytest.MonkeyPatch) -> None:
    """After each key Textual's pilot waits up to two seconds for an idle process, which one that trains never is."""

    async def give_way(*_: float) -> None:
        await asyncio.sleep(0.01)

    monkeypatch.setattr("textual.app.wait_for_idle", give_way)
    monkeypatch.setattr("textual.pilot.wait_for_idle", give_way)


@pytest.fixture
def own_profiles(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the tiny profile as the user's own."""
    monkeypatch.setenv("RETENTION_TUI_PROFILES", str(tiny.parent))
    return tiny.parent


CELL, LINE, FIRST_LINE = 12.2, 24.4, 20.0  # the width and height of a character in a screenshot
TEXT = re.compile(r'<text class="[^"]*-r\d+" x="([\d.]+)" y="([\d.]+)"[^>]*>([^<]*)</text>')


def seen(app: App[str]) -> str:
    """What the screen shows, line by line."""
    lines = [""] * app.size.height
    for x, y, text in TEXT.findall(app.export_screenshot()):
        row = round((float(y) - FIRST_LINE) / LINE)
        lines[row] = lines[row].ljust(round(float(x) / CELL)) + html.unescape(text).replace("\xa0", " ").strip("\n")
    return "\n".join(lines)


def where(app: App[str], name: str) -> tuple[int, int]:
    """Column and line of the last place where a name is shown as the first word of a line."""
    lines = seen(app).splitlines()
    line = max(index for index, line in enumerate(lines) if re.match(rf"\W*{name}\b", line))
    return lines[line].index(name), line


async def until(pilot: Pilot[str], condition: Callable[[], object], seconds: float = 20.0) -> None:
    """Lets the app live until the condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not in {seconds} s; the screen shows:\n{seen(pilot.app)}"
        await asyncio.sleep(0.1)


async def click(pilot: Pilot[str], *target: str, times: int = 1) -> None:
    """Clicks a widget once the screen has settled."""
    await asyncio.sleep(0.3)
    assert await pilot.click(*target, times=times)


async def click_on(pilot: Pilot[str], name: str, times: int = 1) -> None:
    """Clicks the line that begins with a name, once the screen has settled: it may still move when it first appears."""
    await asyncio.sleep(0.5)
    assert await pilot.click(offset=where(pilot.app, name), times=times)


def step_shown(app: RetentionApp) -> int:
    found = re.search(r"step +([\d,]+)", seen(app))
    return int(found[1].replace(",", "")) if found else 0


def stored_events(session: Session, kind: str) -> list[dict[str, object]]:
    assert session.client is not None
    return [event for event in session.client.run.events() if event["event"] == kind]


async def test_the_launcher_starts_a_profile_and_shows_the_run_that_it_left(
    session: Session, own_profiles: Path
) -> None:
    app = RetentionApp(session)
    async with app.run_test(size=(130, 40)) as pilot:
        await until(pilot, lambda: "your own" in seen(app))
        await click_on(pilot, "tiny")
        await until(pilot, lambda: "small enough to be trained in a test" in seen(app) and "8 sequences" in seen(app))
        assert isinstance(app.screen, Launcher) and not session.running  # a click shows
        for _ in range(3):
            app.simulate_key("enter")
        await until(pilot, lambda: isinstance(app.screen, RunScreen))
        await until(pilot, lambda: "● finished" in seen(app))
        assert "step 12 of 12" in seen(app)
        await pilot.press("q")
        await until(pilot, lambda: isinstance(app.screen, Launcher) and "tiny  100 %" in seen(app))
        await pilot.press("end")
        await until(pilot, lambda: "12 of 12" in seen(app) and "all 12 steps are done" in seen(app))
        await pilot.press("enter")
        await until(pilot, lambda: "retention-tui generate tiny" in seen(app))
        assert "While you were away" not in seen(app)  # it was seen
        await pilot.press("q")
    assert app.return_value is None
    assert not session.running
    assert [run.name for run in list_runs(session.runs_folder)] == ["tiny"]


async def test_the_launcher_tells_what_happened_while_one_was_away_and_keeps_itself_fresh(
    session: Session, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RETENTION_TUI_STATE", str(tmp_path / "state"))
    name = "a-night-with-a-long-name"
    session.start(str(tiny), ["train.steps=2"], name=name)
    session.finish()
    (session.runs_folder / "broken").mkdir()
    (session.runs_folder / "broken" / "run.json").write_text('{"format": 1, "profi')
    os.utime(session.runs_folder / "broken", (0, 0))  # so that it is the last of the list
    app = RetentionApp(Session(session.runs_folder))
    async with app.run_test(size=(80, 24)) as pilot:
        await until(pilot, lambda: "While you were away" in seen(app))
        assert re.search(rf"\d\d:\d\d +{name} finished \(held-out \d\.\d+\)", seen(app))
        await until(pilot, lambda: re.search(r"● a-night-with-.*… *100 %", seen(app)))
        await pilot.press("end")
        await until(pilot, lambda: "● damaged" in seen(app) and "json cannot be read" in seen(app))
        await pilot.press("escape")
        await until(pilot, lambda: "While you were away" not in seen(app))
        session.start(str(tiny), ["train.steps=2"], name="later")
        session.finish()
        await until(pilot, lambda: re.search(r"● later +100 %", seen(app)))  # nobody has asked for it
        assert "● damaged" in seen(app) and "json cannot be read" in seen(app)  # what is highlighted stays
        await until(pilot, lambda: re.search(r"\d\d:\d\d +later finished", seen(app)))
        assert f"{name} finished" not in seen(app)  # it was dismissed
        await pilot.press("escape")
        await until(pilot, lambda: "While you were away" not in seen(app))
        await pilot.press("question_mark")
        await until(pilot, lambda: re.search(r"Enter +Start it", seen(app)))
        await until(pilot, lambda: last_look(session.runs_folder) > time.time() - 60)
        assert app.told_until is not None and last_look(session.runs_folder) <= app.told_until
    assert while_away(session.runs_folder) == []


async def test_a_failure_that_was_seen_is_not_told_again(session: Session, own_profiles: Path) -> None:
    (own_profiles / "tiny.toml").write_text('kind = "retention-lm"\n[train]\nsteps = 3\n[data]\nfiles = ["nowhere"]')
    app = RetentionApp(session)
    async with app.run_test(size=(80, 24)) as pilot:
        await until(pilot, lambda: "your own" in seen(app))
        await click_on(pilot, "tiny", times=2)
        await until(pilot, lambda: "● failed" in seen(app) and "data.files" in seen(app))
        await pilot.press("q")
        await until(pilot, lambda: isinstance(app.screen, Launcher))
        await pilot.press("q")
        await until(pilot, lambda: not app.is_running)
    assert session.finish() == 0
    assert session.ended is None


async def test_the_launcher_resumes_a_stopped_run_with_its_curves(session: Session, tiny: Path) -> None:
    session.start(str(tiny), ENDLESS, name="night")
    assert session.client is not None
    client = session.client
    app = RetentionApp(session, client)
    async with app.run_test(size=(130, 40)) as pilot:
        await until(pilot, lambda: step_shown(app) > 20)
        await pilot.press("s", "enter")
        await until(pilot, lambda: "● stopped" in seen(app))
        stopped_at = step_shown(app)
        await pilot.press("q")
    session.finish()
    app = RetentionApp(session)
    async with app.run_test(size=(130, 40)) as pilot:
        await until(pilot, lambda: "night" in seen(app))
        held = RunLock(client.run)  # as while another process that resumes it is loading
        await click_on(pilot, "night")
        await until(pilot, lambda: "Enter Watch" in seen(app))
        held.release()
        await until(pilot, lambda: "Enter Resume" in seen(app))
        await click_on(pilot, "night", times=2)
        await until(pilot, lambda: isinstance(app.screen, RunScreen) and step_shown(app) > stopped_at)
        await pilot.press("3")
        said = "night starts on", f"stopped at step {stopped_at:,}", f"night goes on at step {stopped_at:,}"
        await until(pilot, lambda: all(line in seen(app) for line in said))
        assert [line for line in said[:2] if seen(app).count(line) != 1] == []
        assert sorted(said, key=seen(app).index) == list(said)
        await pilot.press("1")
        await until(pilot, lambda: re.search(r"└┬─", seen(app)) is not None)  # the axis begins where the run began
        await pilot.press("q", "s")
        await until(pilot, lambda: not app.is_running)
    assert [attempt.from_step for attempt in client.run.attempts()] == [0, stopped_at]


def test_two_apps_remember_their_visits_and_damage_costs_one_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = tmp_path / "state"
    monkeypatch.setenv("RETENTION_TUI_STATE", str(state))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: remember_look(tmp_path / f"runs-{number}", moment=1e12 + number), range(40)))
    assert [last_look(tmp_path / f"runs-{number}") for number in range(40)] == [1e12 + number for number in range(40)]
    path = state / "visits.json"
    seen = json.loads(path.read_text())
    seen[str(tmp_path / "runs-7")] = 3
    path.write_text(json.dumps(seen))
    remember_look(tmp_path / "runs-0", "night", moment=2e12)
    assert last_look(tmp_path / "runs-7") < time.time() and last_look(tmp_path / "runs-39") == 1e12 + 39
    assert last_look(tmp_path / "runs-0", "night") == 2e12


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ('kind = "retention-lm"\n[train]\nstepz = 3\n[data]\nbuiltin = "python-docs"', "did you mean 'steps'?"),
        ("kind = ", "not valid TOML"),
    ],
)
async def test_a_bad_profile_is_one_line(session: Session, own_profiles: Path, written: str, said: str) -> None:
    (own_profiles / "wrong.toml").write_text(written)
    app = RetentionApp(session)
    async with app.run_test(size=(130, 40)) as pilot:
        await until(pilot, lambda: "wrong" in seen(app))
        await pilot.press("end")
        await until(pilot, lambda: said in seen(app))
        await pilot.press("enter")
        await pilot.pause(0.5)
        assert isinstance(app.screen, Launcher)
        assert len([line for line in seen(app).splitlines() if said in line]) == 1
    assert not session.running
    assert not session.runs_folder.exists()


async def test_pausing_by_key_and_by_button(session: Session, tiny: Path) -> None:
    app = RetentionApp(session, session.start(str(tiny), ENDLESS))
    async with app.run_test(size=(130, 40)) as pilot:
        await until(pilot, lambda: "● training" in seen(app) and step_shown(app) > 3)
        await pilot.press("space")
        await until(pilot, lambda: "● paused" in seen(app))
        assert "Resume" in seen(app)
        step = step_shown(app)
        await pilot.pause(0.6)
        assert step_shown(app) == step
        await click(pilot, "#key-pause")
        await until(pilot, lambda: "● training" in seen(app) and step_shown(app) > step)
        await click(pilot, "#key-pause")
        await until(pilot, lambda: "● paused" in seen(app))


async def test_checkpoint_and_validation_by_key_button_and_palette(session: Session, tiny: Path) -> None:
    app = RetentionApp(session, session.start(str(tiny), ENDLESS))
    async with app.run_test(size=(130, 40)) as pilot:
        await until(pilot, lambda: step_shown(app) > 3)
        await pilot.press("space")
        await until(pilot, lambda: "● paused" in seen(app))
        await pilot.press("c")
        await until(pilot, lambda: len(stored_events(session, "checkpoint")) == 1)
        await pilot.press("c")
        await until(pilot, lambda: "has been saved already" in seen(app))
        await click(pilot, "#key-validate")
        await until(pilot, lambda: len(stored_events(session, "validation")) == 1)
        await pilot.press("slash", *"pause", "enter")
        await until(pilot, lambda: "● training" in seen(app))
        await click(pilot, "#key-checkpoint")
        await until(pilot, lambda: len(stored_events(session, "checkpoint")) == 2)
    saved = session.client.run.checkpoints_path if session.client else Path()
    assert {path.name for path in saved.iterdir()} >= {
        f"step-{event['step']:07d}" for event in stored_events(session, "checkpoint")
    }


async def test_the_learning_rate_is_changed_while_it_trains(session: Session, tiny: Path) -> None:
    client = session.start(str(tiny), ENDLESS)
    app = RetentionApp(session, client)
    async with app.run_test(size=(110, 34)) as pilot:
        await until(pilot, lambda: step_shown(app) > 2)
        await pilot.press("l")
        await until(pilot, lambda: "checkpoint.every_minutes" in seen(app))
        await pilot.press("enter")
        await until(pilot, lambda: "train.learning_rate: to what?" in seen(app))
        await pilot.press(*"fast", "enter")
        await until(pilot, lambda: "should be a number" in seen(app))
        await pilot.press(*["backspace"] * 4, *"1e-4", "enter")
        await until(pilot, lambda: not isinstance(app.screen, SettingQuestion))
        await until(pilot, lambda: "1.00e-04" in seen(app))
        await pilot.press("l")
        await until(pilot, lambda: isinstance(app.screen, SettingQuestion))
        await pilot.press("escape")
        await until(pilot, lambda: not isinstance(app.screen, SettingQuestion))
    assert client.run.identity()["amendments"][0]["key"] == "train.learning_rate"
    assert len(client.run.identity()["amendments"]) == 1


async def test_a_chat_streams_while_training_goes_on_and_an_answer_can_be_cancelled(
    session: Session, tiny: Path
) -> None:
    slow = ["model.width=256", "model.layers=12", "model.heads=8"]  # so that an answer takes its time
    app = RetentionApp(session, session.start(str(tiny), [*ENDLESS, *slow]))
    async with app.run_test(size=(130, 40)) as pilot:
        await until(pilot, lambda: step_shown(app) > 0)
        await pause(pilot)
        await pilot.press("2", *"c [b]s")
        assert app.screen.query_one("#prompt", Input).value == "c [b]s"  # keys that steer the run are letters here
        await click(pilot, "#key-pause")
        await pilot.press("enter")
        await until(pilot, lambda: "Esc cancels" in seen(app))
        step, tokens = step_shown(app), tokens_shown(app)
        await until(pilot, lambda: step_shown(app) > step and tokens_shown(app) > tokens)
        await pilot.press("escape")
        await until(pilot, lambda: "cancelled" in seen(app))
        assert "c [b]s" in seen(app)
        assert tokens_shown(app) < 256
        await pilot.press("escape", "1")
        await until(pilot, lambda: "grad norm" in seen(app) and "it/s" in seen(app))


def tokens_shown(app: RetentionApp) -> int:
    found = re.search(r"(\d+) tokens ", seen(app))
    return int(found[1]) if found else 0


async def test_quitting_asks_and_stays(session: Session, tiny: Path) -> None:
    app = RetentionApp(session, session.start(str(tiny), ENDLESS))
    async with app.run_test(size=(80, 24)) as pilot:
        await until(pilot, lambda: step_shown(app) > 1)
        await pause(pilot)
        for key in ("q", "ctrl+c", "ctrl+q"):
            await pilot.press(key)
            assert isinstance(app.screen, Question)
            await pilot.press("ctrl+c")  # a question that is open stays
            assert isinstance(app.screen, Question)
            await pilot.press("escape")
            assert isinstance(app.screen, RunScreen)
        step = step_shown(app)
        await pilot.press("space")
        await until(pilot, lambda: step_shown(app) > step)


async def test_quitting_stops_with_a_checkpoint(session: Session, tiny: Path) -> None:
    client = session.start(str(tiny), ENDLESS)
    app = RetentionApp(session, client)
    async with app.run_test(size=(80, 24)) as pilot:
        await until(pilot, lambda: step_shown(app) > 1)
        await pilot.press("ctrl+c")
        await until(pilot, lambda: "Stop and quit" in seen(app))
        await click(pilot, "#stop")
        await until(pilot, lambda: not app.is_running)
    assert app.return_value is None
    assert not client.alive
    assert session.finish() == 0
    assert client.run.summary().state == State.STOPPED
    assert (client.run.checkpoints_path / f"step-{client.run.summary().step:07d}").is_dir()


async def test_leaving_the_screen_leaves_training_alone(session: Session, tiny: Path) -> None:
    client = session.start(str(tiny), ENDLESS)
    app = RetentionApp(session, client)
    async with app.run_test(size=(80, 24)) as pilot:
        await until(pilot, lambda: step_shown(app) > 1)
        await pilot.press("q", "l")
        await until(pilot, lambda: not app.is_running)
    assert app.return_value == "detach"
    assert session.running
    assert goes_on(client.run)


def goes_on(run: RunDirectory) -> bool:
    before, deadline = run.summary().step, time.monotonic() + 10
    while time.monotonic() < deadline and run.summary().step <= before:
        time.sleep(0.05)
    return run.summary().step > before


async def test_any_size_shows_state_step_and_loss(session: Session, tiny: Path) -> None:
    app = RetentionApp(session, session.start(str(tiny), ENDLESS))
    async with app.run_test(size=(130, 40)) as pilot:
        await until(pilot, lambda: step_shown(app) > 1)
        await pause(pilot)
        step = step_shown(app)
        for size, charts in {(20, 5): 0, (1, 1): 0, (80, 24): 1, (40, 12): 1, (200, 60): 4, (130, 40): 4}.items():
            await pilot.resize_terminal(*size)
            for key in ("2", "escape", "3", "1", "n", "z", "question_mark", "escape", "q", "escape", "z"):
                await pilot.press(key)
                if key in ("question_mark", "q"):
                    await until(pilot, lambda: not isinstance(app.screen, RunScreen))
                if key == "escape":
                    await until(pilot, lambda: isinstance(app.screen, RunScreen))
            if size != (1, 1):
                await until(pilot, lambda: "● paused" in seen(app))
                assert step_shown(app) == step
                assert re.search(r"loss\s", seen(app)) and re.search(r"\d\.\d\d", seen(app))
            await until(pilot, lambda n=charts: sum(chart.is_on_screen for chart in app.screen.query(Chart)) == n)


async def pause(pilot: Pilot[str]) -> None:
    await pilot.press("space")
    await until(pilot, lambda: "● paused" in seen(pilot.app))


async def test_the_launcher_is_usable_in_twenty_by_five(session: Session, own_profiles: Path) -> None:
    app = RetentionApp(session)
    async with app.run_test(size=(20, 5)) as pilot:
        await until(pilot, lambda: app.screen.query_one(OptionList).highlighted is not None)
        await pilot.press("end")
        await until(pilot, lambda: "tiny" in seen(app))
        await pilot.press("enter")
        await until(pilot, lambda: "● finished" in seen(app))


async def test_an_alarm_stays_until_it_is_read(session: Session, tiny: Path) -> None:
    client = session.start(str(tiny), ["train.learning_rate=10", "train.warmup_steps=0", "train.clip_norm=0"])
    folder = client.run.checkpoints_path
    folder.parent.mkdir(exist_ok=True)
    folder.write_text("no folder, so no checkpoint can be written")
    app = RetentionApp(session, client)
    async with app.run_test(size=(130, 40)) as pilot:
        await until(pilot, lambda: "● failed" in seen(app) or "● finished" in seen(app))
        assert "a read" in seen(app)
        await pilot.press("2", "escape", "1")
        assert "a read" in seen(app)
        await pilot.press("a")
        await pilot.pause(0.3)
        assert "a read" not in seen(app)
        await pilot.press("3")
        await until(pilot, lambda: "checkpoint" in seen(app))  # the log keeps it


async def test_light_and_dark_both_draw(session: Session, tiny: Path) -> None:
    app = RetentionApp(session, session.start(str(tiny), ENDLESS))
    async with app.run_test(size=(130, 40)) as pilot:
        await until(pilot, lambda: step_shown(app) > 1)
        await until(pilot, lambda: "pressure" in seen(app))  # what the machine says comes once a second
        dark = app.export_screenshot()
        await pilot.press("ctrl+l")
        await pilot.pause(0.2)
        assert app.current_theme.name == "retention-light"
        assert "#12151b" in dark and "#12151b" not in app.export_screenshot()
