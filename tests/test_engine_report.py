"""The story of a run, and what happened while its owner was away: told from what real runs left on disk."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.errors import UserError
from engine.events import Alarm, Level, Notice, Reading, RunEnded, RunOpened, State, StateChanged
from engine.profile_files import load_profile
from engine.report import INTERRUPTED, Change, report
from engine.runs import create_run
from engine.store import RunDirectory
from engine.store_writer import StoreWriter
from retention_tui.progress import Weight
from retention_tui.story import befallen, page, while_away
from retention_tui.visits import last_look, remember_look

COMMAND = [sys.executable, "-m", "retention_tui"]
HOUR = 3600.0
NIGHT = time.time() - 10 * HOUR


class Told:
    """A run that is told to the store, with times of our own; each time is in hours after the night began."""

    def __init__(self, folder: Path, name: str = "night", **identity: object) -> None:
        given = {"profile": {"kind": "retention-lm"}, "environment": {}, **identity}
        self.run = create_run(folder, "demo", given, name)

    def attempt(self, from_step: int, at: float, trained: int | None = None) -> StoreWriter:
        store = StoreWriter(self.run)
        number = store.begin_attempt(from_step, 300)
        opened = RunOpened(
            time=NIGHT + at * HOUR, run=self.run.name, directory="", task="retention-lm", device="cpu",
            dtype="float32", parameters=900, step=from_step, total_steps=300, attempt=number,
            trained_parameters=trained,
        )  # fmt: skip
        store.record_event(opened)
        store.set_state(State.TRAINING)
        return store

    @staticmethod
    def steps(store: StoreWriter, first: int, last: int, at: float, val_loss: float | None = None) -> None:
        for step in range(first, last + 1):
            store.record(step, {"loss": 5.0, "elapsed_seconds": step * 2.0, "time": NIGHT + at * HOUR})
        store.record(last, {"peak_memory_bytes": 1.5e9, **({"val_loss": val_loss} if val_loss else {})})


def at(hours: float) -> float:
    return NIGHT + hours * HOUR


@pytest.fixture
def eventful(tmp_path: Path) -> RunDirectory:
    """Begun, warned, paused, killed; gone on with from a step before; finished."""
    told = Told(tmp_path / "runs")
    store = told.attempt(0, 0)
    told.steps(store, 1, 100, 1, val_loss=3.5)
    store.record_event(Alarm(time=at(1.1), level="warning", text="pressure was yellow: micro-batch 4 → 2"))
    store.record_event(StateChanged(time=at(1.2), state=State.PAUSED, reason="pressure was red"))
    store.record_event(StateChanged(time=at(1.7), state=State.TRAINING))
    for second in range(90):
        level = Level.GREEN if second < 60 else Level.YELLOW if second < 80 else None
        store.record_reading(Reading(time=at(1) + second, level=level, swap_bytes=second * 10_000_000))
    told.steps(store, 101, 120, 2)
    store.close()
    store = told.attempt(100, 5)
    told.steps(store, 101, 200, 6, val_loss=3.25)
    told.steps(store, 201, 300, 7, val_loss=3.75)
    store.record_event(Notice(time=at(7), text="an aside"))
    store.set_state(State.FINISHED, "all 300 steps are done")
    ended = RunEnded(time=at(7), state=State.FINISHED, reason="all 300 steps are done", exit_code=0, step=300)
    store.record_event(ended)
    store.close()
    with contextlib.closing(sqlite3.connect(told.run.database_path)) as database:  # the store has a clock of its own
        database.execute("UPDATE attempt SET started = ? WHERE id = 1", (at(0),))
        database.execute("UPDATE attempt SET started = ?, ended = ? WHERE id = 2", (at(5), at(7)))
        database.commit()
    return told.run


def test_the_story_of_an_eventful_night(eventful: RunDirectory) -> None:
    story = report(eventful)
    first, second = story.stretches
    assert (first.from_step, first.to_step, first.state) == (0, 120, INTERRUPTED)
    assert (second.from_step, second.to_step, second.state, second.reason) == (
        100, 300, State.FINISHED, "all 300 steps are done",
    )  # fmt: skip
    assert (story.state, story.step, story.total_steps, story.live) == ("finished", 300, 300, False)
    assert (story.best_step, story.best_val_loss, story.val_loss) == (200, 3.25, 3.75)
    assert story.trained_seconds == 600 and story.peak_memory_bytes == 1.5e9
    assert [(alarm.time, alarm.level) for alarm in story.alarms] == [(at(1.1), "warning")]
    (rest,) = story.rests
    assert (rest.began, rest.ended, rest.reason) == (at(1.2), at(1.7), "pressure was red")
    assert story.pressure_seconds == {"green": 60, "yellow": 20} and story.most_swap_bytes == 890_000_000


def test_the_page_tells_it_in_order(eventful: RunDirectory) -> None:
    lines = page(report(eventful))
    assert lines[0] == "night: finished at step 300 of 300: all 300 steps are done"
    told = [line[18:] for line in lines if line.startswith("20")]
    assert told == [
        "began",
        "warning: pressure was yellow: micro-batch 4 → 2",
        "paused for 30 m 00 s: pressure was red",
        "broke off after step 120, without a word: killed, or without power",
        "attempt 2 went on from step 100",
        "finished at step 300: all 300 steps are done",
    ]
    facts = "\n".join(lines)
    for words in ("10 m 00 s in 2 attempts, paused for 30 m", "best 3.250 at step 200", "pressure yellow for 20 s"):
        assert words in facts


def test_what_was_trained_and_what_was_changed_meanwhile_is_told(tmp_path: Path) -> None:
    profile = load_profile("lora-m2-air-8gb-4bit", ["data.loss_on=answers"]).model_dump(mode="json", by_alias=True)
    amendments = [
        {"from_step": 90, "key": "train.micro_batch_size", "value": "1"},
        {"from_step": 60, "key": "rollback", "value": "70"},
        {"from_step": 40, "key": "train.learning_rate", "value": "1e-4"},
    ]
    told = Told(tmp_path, profile=profile, amendments=amendments)
    told.attempt(0, 0, trained=40).close()
    assert report(told.run).changes == [
        Change(40, "train.learning_rate", "1e-4"),
        Change(90, "train.micro_batch_size", "1"),
    ]
    shown = subprocess.run(
        [*COMMAND, "show", "night", "--runs-dir", str(tmp_path)], capture_output=True, text=True, check=True
    )
    for said in ("\n".join(page(report(told.run))), shown.stdout):
        assert "40 of 0.9 k parameters trained" in said
        for words in (
            profile["model"]["init_from"],
            r"method +LoRA",
            r"rank 32, alpha \d+",
            r"rows .*, loss on answers",
            r"changed +train\.learning_rate = 1e-4 after step 40\n +train\.micro_batch_size = 1 after step 90",
        ):
            assert re.search(words, said), words
        assert "rollback" not in said


def test_a_long_story_still_fits_on_a_page(tmp_path: Path) -> None:
    told = Told(tmp_path)
    store = told.attempt(0, 0)
    for number in range(500):
        store.record_event(Alarm(level="critical", text=f"alarm {number}\nsecond line \x1b[2J"))
    store.close()
    lines = page(report(told.run))
    assert len(lines) < 45 and any("478 more" in line for line in lines)
    assert not any("\n" in line or "\x1b" in line for line in lines)
    assert any("alarm 499" in line for line in lines) and "500" in "\n".join(lines)


def test_a_run_that_never_began_and_a_damaged_one(tmp_path: Path) -> None:
    told = Told(tmp_path)
    assert report(told.run).stretches == [] and page(report(told.run))
    told.run.database_path.write_bytes(b"no database" * 1000)
    with pytest.raises(UserError):
        report(told.run)
    assert while_away(tmp_path) == []


class TestWhileAway:
    @pytest.mark.parametrize(
        ("since", "said"),
        [
            (
                0.5,
                "night finished (held-out 3.250), raised an alarm at {alarm}: pressure was yellow: micro-batch 4 → 2",
            ),
            (1.15, "night finished (held-out 3.250)"),
        ],
    )
    def test_what_is_told_is_what_came_since(self, eventful: RunDirectory, since: float, said: str) -> None:
        story = report(eventful)
        news = befallen(story, at(since))
        assert news is not None
        assert news.text == said.format(alarm=time.strftime("%H:%M", time.localtime(at(1.1))))
        assert news.time == at(7)

    def test_nothing_that_happened_says_nothing(self, eventful: RunDirectory) -> None:
        assert befallen(report(eventful), time.time() + 1) is None

    @pytest.mark.parametrize(
        ("state", "words", "weight"),
        [
            (State.STOPPED, "stopped: memory", Weight.PLAIN),
            (State.FAILED, "failed: memory", Weight.CRITICAL),
            (None, "broke off at step 3", Weight.CRITICAL),
        ],
    )
    def test_every_end_is_told(self, tmp_path: Path, state: State | None, words: str, weight: Weight) -> None:
        told = Told(tmp_path)
        store = told.attempt(0, 0)
        told.steps(store, 1, 3, 1)
        if state is not None:
            store.set_state(state, "memory pressure was red")
        store.record_event(Alarm(time=at(1), level="critical", text="memory pressure was red"))
        store.close()
        (news,) = while_away(tmp_path)
        assert words in news.text and news.weight is weight
        assert news.text.count("memory pressure was red") == 1
        remember_look(tmp_path, "night")
        assert while_away(tmp_path) == []

    def test_the_gravest_and_then_the_newest_comes_first_and_a_look_is_of_one_folder(self, tmp_path: Path) -> None:
        for name, state in (("one", State.FAILED), ("two", State.FINISHED), ("three", State.STOPPED)):
            for folder in ("here", "there"):
                store = Told(tmp_path / folder, name).attempt(0, 0)
                store.set_state(state)
                store.close()
            time.sleep(0.01)
        assert [news.text.split()[0] for news in while_away(tmp_path / "here")] == ["one", "three", "two"]
        remember_look(tmp_path / "here")
        assert while_away(tmp_path / "here") == []
        assert len(while_away(tmp_path / "there")) == 3
        assert while_away(tmp_path / "nowhere") == []

    @pytest.mark.parametrize("damage", ["", "[]", '{"x": 3}', '{"%s": {"folder": "soon", "runs": []}}'])
    def test_a_damaged_memory_is_as_none(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
        monkeypatch.setenv("RETENTION_TUI_STATE", str(tmp_path / "state"))
        (tmp_path / "state").mkdir()
        (tmp_path / "state" / "visits.json").write_text(damage.replace("%s", str(tmp_path)))
        assert last_look(tmp_path, "demo") == pytest.approx(time.time() - 24 * HOUR, abs=5)
        remember_look(tmp_path, moment=9e9)
        assert last_look(tmp_path, "demo") == 9e9

    def test_a_memory_that_cannot_be_written_is_no_error(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "file").touch()
        monkeypatch.setenv("RETENTION_TUI_STATE", str(tmp_path / "file" / "state"))
        remember_look(tmp_path)


def test_a_killed_run_is_told_by_the_command(tiny: Path, tmp_path: Path, wait: Callable[..., None]) -> None:
    runs = ["--runs-dir", str(tmp_path / "runs")]
    settings = ["--set", "train.steps=100000", "--set", "validate.every=0", "--name", "night"]
    process = subprocess.Popen([*COMMAND, "run", str(tiny), *settings, "--headless", *runs], stdout=subprocess.DEVNULL)
    run = RunDirectory(tmp_path / "runs" / "night")
    try:
        wait(lambda: run.database_path.exists() and (run.last("loss") or (0,))[0] >= 6)
        live = report(run)
        assert live.live and live.state == State.TRAINING and not live.stretches[-1].over
        assert befallen(live, 0.0) is None
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    told = subprocess.run([*COMMAND, "report", "night", "--json", *runs], capture_output=True, text=True, check=True)
    story = json.loads(told.stdout)
    assert story["state"] == INTERRUPTED and story["stretches"][0]["to_step"] == story["step"] >= 6
    assert 0 <= time.time() - story["last_sign"] < 60
    assert any(f"broke off after step {story['step']}, without a word" in line for line in page(report(run)))


@pytest.fixture
def wait() -> Callable[..., None]:
    def wait(condition: Callable[[], bool], seconds: float = 30) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.05)

    return wait
