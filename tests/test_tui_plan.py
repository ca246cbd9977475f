"""The plan as a person meets it: on the command line, in the launcher, beside a run; and what it refuses to start."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_tui_app import ENDLESS, click_on, seen, until

from engine.commands import Set, Stop
from engine.planner import plan, profile_of
from engine.planning import Setting, demand_of
from engine.planning.capacity import Capacity
from engine.planning.report import as_table
from engine.profile_files import load_profile
from engine.runs import list_runs
from retention_tui.app import RetentionApp
from retention_tui.plan_view import MOMENTS, lines, time_words
from retention_tui.session import Session
from retention_tui.widgets.plan import summary

WITHOUT_DATA = """
kind = "retention-lm"
[data]
files = ["nowhere"]
tokenizer = "nowhere-either"
[model]
width = 32
layers = 2
heads = 2
vocab_size = 300
[train]
steps = 1000
batch_size = 8
micro_batch_size = 4
sequence_length = 32
"""
BEYOND_ANY_MACHINE = ["model.width=16384", "model.heads=256", "model.layers=200"]


@pytest.fixture(autouse=True)
def _own_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured in a test is remembered for that test."""
    monkeypatch.setenv("RETENTION_TUI_CACHE", str(tmp_path / "cache"))


def retention_tui(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "retention_tui", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


@pytest.fixture
def without_data(tmp_path: Path) -> Path:
    """A profile whose text and tokenizer do not exist."""
    profile = tmp_path / "planned.toml"
    profile.write_text(WITHOUT_DATA)
    return profile


def test_the_command_needs_neither_data_nor_tokenizer(without_data: Path, tmp_path: Path) -> None:
    done = retention_tui("plan", without_data, "--json", "--runs-dir", tmp_path / "runs")
    assert (done.returncode, done.stderr) == (0, "")
    table = json.loads(done.stdout)
    assert table["verdict"] == "green" and table["suggestions"] == []
    assert table["need_bytes"] == sum(table["components"].values()) > table["predicted_peak_bytes"] > 0
    assert (table["micro_batch_size"], table["accumulation"], table["time"]["steps"]) == (4, 2, 1000)
    assert not (tmp_path / "runs").exists()


def test_measuring_sets_the_real_step_beside_the_prediction(without_data: Path, tmp_path: Path) -> None:
    options = ["--set", "train.batch_size=64", "--set", "train.micro_batch_size=32", "--runs-dir", tmp_path / "runs"]
    done = retention_tui("plan", without_data, "--measure", *options)
    assert (done.returncode, done.stderr) == (0, "")
    ratio = re.search(r"MLX's peak +\S+ MB +\S+ MB +([\d.]+) ×", done.stdout)
    assert ratio and float(ratio[1]) == pytest.approx(1, abs=0.1)
    assert re.search(r"time +about .* from \d+ steps? measured", done.stdout)


def test_what_no_machine_has_memory_for_is_refused_in_one_line(tmp_path: Path, without_data: Path) -> None:
    options = [part for setting in BEYOND_ANY_MACHINE for part in ("--set", setting)]
    start = ["run", without_data, *options, "--headless", "--runs-dir", tmp_path / "runs"]
    done = retention_tui(*start)
    assert done.returncode == 2
    assert done.stderr.startswith("retention-tui: nothing of this fits") and done.stderr.count("\n") == 1
    assert not (tmp_path / "runs").exists()
    measured = retention_tui("plan", without_data, *options, "--measure")
    assert measured.returncode == 2 and measured.stderr.endswith("so it is not measured\n")
    anyway = retention_tui(*start, "--anyway")
    assert "warning: nothing of this fits" in anyway.stdout
    assert "nowhere" in anyway.stderr  # it went on to the data


async def test_the_launcher_shows_memory_and_time_and_measures(
    session: Session, without_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RETENTION_TUI_PROFILES", str(without_data.parent))
    app = RetentionApp(session)
    async with app.run_test(size=(130, 40)) as pilot:
        await until(pilot, lambda: "your own" in seen(app))
        await click_on(pilot, "planned")
        await until(pilot, lambda: "● fits" in seen(app), 40)
        assert re.search(r"memory +0\.2 of [\d,.]+ GB +● fits", seen(app))
        await until(pilot, lambda: "■ activations" in seen(app) and "unknown until steps are measured" in seen(app))
        await pilot.press("m")
        await until(pilot, lambda: re.search(r"time +about .* measured", seen(app)) is not None, 60)


async def test_the_launcher_refuses_what_cannot_fit(
    session: Session, without_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RETENTION_TUI_PROFILES", str(without_data.parent))
    huge = WITHOUT_DATA.replace("width = 32", "width = 16384").replace("layers = 2", "layers = 200")
    without_data.write_text(huge.replace("heads = 2", "heads = 256"))
    app = RetentionApp(session)
    async with app.run_test(size=(80, 24)) as pilot:
        await until(pilot, lambda: "your own" in seen(app))
        await click_on(pilot, "planned")
        await until(pilot, lambda: "● too large" in seen(app), 40)
        await pilot.press("enter")
        await until(pilot, lambda: "nothing of this fits" in seen(app))
    assert list_runs(session.runs_folder) == [] and not session.running


async def test_a_run_shows_its_plan_beside_what_it_has_taken(session: Session, tiny: Path) -> None:
    client = session.start(str(tiny), ENDLESS)
    app = RetentionApp(session, client)
    async with app.run_test(size=(100, 34)) as pilot:
        await pilot.press("4")
        row = re.compile(r"MLX's peak +(\d+) (?:MB|kB) +(\d+) (?:MB|kB)")
        await until(pilot, lambda: row.search(seen(app)) is not None, 40)
        assert re.search(r"speed +– +\d+(\.\d+)? it/s", seen(app))
        assert re.search(r"time +about \d.* left at \d+(\.\d+)? it/s", seen(app))
        assert "at the largest moment of a step" in seen(app)
        assert re.search(r"gradients +\S+ .B +\S+ .B +[^ \d]", seen(app))  # not of the same moment: no ratio
        assert "2 micro-batches of 4 sequences" in seen(app)
        client.send(Set("train.micro_batch_size", "2"))
        await until(pilot, lambda: "4 micro-batches of 2 sequences" in seen(app), 40)
        client.send(Stop())
        await until(pilot, lambda: re.search(r"time +[\d,]+ steps are done, in \d", seen(app)) is not None)
        await pilot.press("1")
        await until(pilot, lambda: "MLX's peak" not in seen(app))


def test_a_run_is_planned_as_it_is_now(session: Session, tiny: Path) -> None:
    client = session.start(str(tiny), ["train.steps=2"], name="night")
    assert session.finish() == 0
    folder = client.run.path.parent
    assert re.search(
        r"time +about .*, from 2 steps of", retention_tui("plan", client.run.path, "--runs-dir", folder).stdout
    )
    shrunk = [
        {"from_step": step, "key": "train.micro_batch_size", "value": size} for step, size in ((1, "2"), (9, "1"))
    ]
    client.run.update_identity(amendments=shrunk)
    done = retention_tui("plan", client.run.path, "--json")
    table = json.loads(done.stdout)
    assert (table["micro_batch_size"], table["accumulation"]) == (2, 4)


def test_a_resumed_run_is_warned_and_not_refused(session: Session, tiny: Path) -> None:
    client = session.start(str(tiny), [f"guard.memory.limit_gb={1e-4}", "train.steps=2"], name="night", anyway=True)
    assert session.finish() == 0
    client = session.resume("night")
    assert session.finish() == 0
    warnings = [event["text"] for event in client.run.events() if event.get("guard") == "plan"]
    assert len(warnings) == 2 and warnings[0] == warnings[1]
    assert "guard.memory.limit_gb allows" in warnings[1]


def test_a_limit_that_was_changed_counts(session: Session, tiny: Path) -> None:
    client = session.start(str(tiny), ["train.steps=2"], name="night")
    assert session.finish() == 0
    client.run.update_identity(amendments=[{"from_step": 1, "key": "guard.stop_at", "value": "07:00"}])
    assert profile_of(client.run).guard.stop_at == "07:00"


def test_what_is_unknown_is_not_shown_as_fitting() -> None:
    table = as_table(plan(load_profile("demo"), capacity=Capacity(limit_bytes=None), setting=Setting()))
    first = summary(table, 80)[0]
    assert "○ unknown" in first.plain and "●" not in first.plain
    assert not any("success" in str(span.style) for span in first.spans)
    assert "○ unknown: about" in "\n".join(lines(table))


def test_the_table_says_of_which_moment_it_is() -> None:
    table = as_table(plan(load_profile("demo"), capacity=Capacity(limit_bytes=10**12), setting=Setting()))
    said = next(line for line in lines(table) if "at the largest moment of a step" in line)
    assert MOMENTS[table["moment"]] in said
    profiles = [load_profile("demo"), load_profile("demo", ["train.gradient_checkpointing=true"])]
    known = {moment.name for profile in profiles for moment in demand_of(profile).moments(profile, Setting())}
    assert known <= set(MOMENTS)


def timing(**known: Any) -> dict[str, Any]:
    unknown = {"steps": 468, "seconds": None, "ends": None, "limit": "", "steps_within_limit": None, "samples": 9}
    return {"seconds_a_step": None, "source": "unknown", **unknown, **known}


@pytest.mark.parametrize(
    ("known", "said"),
    [
        ({}, "unknown until steps are measured: --measure does that"),
        (
            {"seconds_a_step": 51.3, "source": "measured", "seconds": 24_000, "ends": 0},
            "about 6 h 40 m: ends .*, from 9 steps measured",
        ),
        (
            {"seconds_a_step": 900.0, "source": "earlier runs", "seconds": 421_200, "limit": "by 07:00"}
            | {"steps_within_limit": 18},
            "about 18 of 468 steps by 07:00: too few, from 9 steps of an earlier run",
        ),
        (
            {"seconds_a_step": 1e6, "source": "estimate", "seconds": 4.68e8, "ends": 0},
            "more than a year, a rough estimate from a run of another shape; --measure knows better",
        ),
        (
            {"seconds_a_step": 163.0, "source": "estimate", "seconds": 76_370, "ends": 0},
            "15 to 30 h, a rough estimate from a run of another shape; --measure knows better",
        ),
        (
            {
                "seconds_a_step": 40_000.0,
                "source": "estimate",
                "steps": None,
                "limit": "in 8 h",
                "steps_within_limit": 0,
            },
            "not one step in 8 h, a rough estimate .*",
        ),
        (
            {"seconds_a_step": 100.0, "source": "estimate", "seconds": 46_800, "limit": "by 07:00"}
            | {"steps_within_limit": 100},
            "71 to 141 of 468 steps by 07:00: too few, a rough estimate .*",
        ),
        (
            {"seconds_a_step": 100.0, "source": "estimate", "seconds": 46_800, "limit": "by 07:00"}
            | {"steps_within_limit": 400},
            "283 to 468 of 468 steps by 07:00: perhaps too few, a rough estimate .*",
        ),
        (
            {"seconds_a_step": 100.0, "source": "estimate", "seconds": 46_800, "limit": "by 07:00"}
            | {"steps_within_limit": 468, "ends": 46_800, "limit_at": 50_000},
            "9.2 to 18 h, perhaps not all of it by 07:00, a rough estimate .*",
        ),
        (
            {"seconds_a_step": 3.0, "source": "estimate", "steps": None},
            "2.1 to 4.2 s a step, a rough estimate from a run of another shape.*; how many steps, the data will tell",
        ),
        (
            {"seconds_a_step": 0.25, "source": "measured", "steps": None, "samples": 1},
            "about 0.25 s a step, from 1 step measured; how many steps, the data will tell",
        ),
    ],
)
def test_time_in_words(known: dict[str, Any], said: str) -> None:
    assert re.fullmatch(said, time_words(timing(**known)))


@pytest.mark.parametrize("width", [24, 38, 67, 120])
def test_the_summary_keeps_to_its_width(width: int) -> None:
    profile = load_profile("retention-small", ["train.micro_batch_size=32"])
    table = as_table(plan(profile, capacity=Capacity(limit_bytes=20 * 10**9), setting=Setting()))
    shown = [line for content in summary(table, width) for line in content.plain.splitlines()]
    bar = next(line for line in shown if "█" in line)
    assert bar == "█" * min(60, width)
    longest = max(max(map(len, word.split())) for word in shown)
    assert all(len(line) <= max(width, longest + 8) for line in shown[1:])
    assert "fits with train.micro_batch_size=" in " ".join(" ".join(shown).split())
