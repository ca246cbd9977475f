"""The command line: what it loads, how it answers to mistakes and misfortunes, and what it tells of a run."""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

from engine.store import RunDirectory

COMMAND = [sys.executable, "-m", "retention_tui"]


def retention_tui(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, *map(str, arguments)]
    variables = {**os.environ, **environment}
    return subprocess.run(command, env=variables, capture_output=True, text=True, check=False, timeout=60)


def settings(*pairs: str) -> list[str]:
    return [part for pair in pairs for part in ("--set", pair)]


def the_one_line(done: subprocess.CompletedProcess[str]) -> str:
    """Standard error, which has to be one line of ours."""
    assert done.stderr.startswith("retention-tui: ") and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def strict_json(text: str) -> Any:
    """JSON as the standard has it: without NaN."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


@dataclass
class Trained:
    """A finished run, which tests read and leave as it is; `events` is what it said."""

    profile: Path
    folder: Path
    events: list[dict[str, Any]]

    @property
    def run(self) -> RunDirectory:
        return RunDirectory(self.folder / "tiny")

    def ask(self, command: str, *arguments: str | Path) -> str:
        done = retention_tui(command, *arguments, "--runs-dir", self.folder)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    def copy_to(self, folder: Path) -> RunDirectory:
        shutil.copytree(self.run.path, folder / "tiny")
        return RunDirectory(folder / "tiny")


@pytest.fixture(scope="module")
def trained(shared_tiny: Path) -> Trained:
    folder = shared_tiny.parent / "runs"
    done = retention_tui("run", shared_tiny, "--json", "--runs-dir", folder)
    assert (done.returncode, done.stderr) == (0, "")
    return Trained(shared_tiny, folder, [strict_json(line) for line in done.stdout.splitlines()])


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["profiles"], ["runs"], ["runs", "--json"]])
def test_what_needs_no_model_loads_neither_mlx_nor_textual(arguments: list[str], tmp_path: Path) -> None:
    script = f"""
        import sys
        sys.argv = ["retention-tui", *{arguments}]
        from retention_tui.cli import main
        try:
            main()
        except SystemExit as end:
            assert not end.code, end.code
        sys.stderr.write(" ".join(sorted({{name.partition(".")[0] for name in sys.modules}})))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    loaded = set(done.stderr.split())
    assert "typer" in loaded
    assert loaded.isdisjoint({"mlx", "textual", "transformers", "tokenizers", "plotext"})


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["rum"], "run"),
        (["run"], "PROFILE"),
        (["run", "demo", "--stepz", "3"], "--stepz"),
        (["generate", "demo", "-p", "x", "--max-tokens", "0"], "--max-tokens"),
    ],
)
def test_wrong_usage_is_exit_code_2(arguments: list[str], hint: str) -> None:
    done = retention_tui(*arguments)
    assert done.returncode == 2
    assert hint in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["run", "dmeo"], "demo"),
        (["run", "demo", "--set", "train.stepz=3"], "steps"),
        (["run", "demo", "--set", "train.steps=many"], "train.steps"),
        (["resume", "nothing"], "nothing"),
        (["show", "nothing"], "nothing"),
        (["export", "nothing"], "nothing"),
        (["generate", "nothing", "-p", "x"], "nothing"),
        ([], "--headless"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments: list[str], hint: str, tmp_path: Path) -> None:
    done = retention_tui("--runs-dir", tmp_path / "runs", *arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert hint in the_one_line(done)
    assert not (tmp_path / "runs").exists()


def test_the_runs_folder_may_stand_before_and_after_the_command(tmp_path: Path) -> None:
    here = tmp_path / "here"
    for arguments in (["--runs-dir", here, "runs"], ["runs", "--runs-dir", here]):
        assert str(here) in retention_tui(*arguments).stdout


def test_a_reader_that_leaves_is_no_error() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "retention_tui", "profiles"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.close()
    process.stdout = None
    assert process.communicate(timeout=30) == (None, b"")
    assert process.returncode == 0


def test_version() -> None:
    assert retention_tui("--version").stdout == "retention-tui 0.1.0\n"


def test_a_defect_is_one_line_and_exit_code_1(trained: Trained, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import time\ndef broken(*_): raise RuntimeError('the clock broke')\ntime.strftime = broken"
    )
    variables = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}", "TMPDIR": str(tmp_path)}
    done = retention_tui("runs", "--runs-dir", trained.folder, **variables)
    assert done.returncode == 1
    (details,) = tmp_path.glob("retention-tui-*.txt")
    assert "the clock broke" in the_one_line(done) and str(details) in done.stderr
    assert details.read_text().startswith("Traceback")


class TestBadInput:
    """What a user can do wrong with a run: exit code 2, one line, and the run's name stays free."""

    def refused(self, profile: Path, *options: str) -> str:
        folder = profile.parent / "runs"
        done = retention_tui("run", profile, *options, "--headless", "--runs-dir", folder)
        assert done.returncode == 2, done.stderr
        assert not folder.exists() or list(folder.iterdir()) == []
        return the_one_line(done)

    def test_a_missing_data_file(self, tiny: Path) -> None:
        assert "nowhere.txt" in self.refused(tiny, *settings("data.files=nowhere.txt"))

    @pytest.mark.parametrize(
        ("text", "hint"), [("", "little.txt"), ("Two lines.\nToo short.\n", "train.sequence_length")]
    )
    def test_a_data_file_without_enough_text(self, tiny: Path, text: str, hint: str) -> None:
        (tiny.parent / "little.txt").write_text(text)
        said = self.refused(tiny, *settings(f"data.files={tiny.parent}/little.txt", "data.split=tail"))
        assert hint in said and ("empty" if not text else "fewer than one sequence") in said

    @pytest.mark.parametrize(
        ("line", "broken", "hints"),
        [
            ("warmup_steps = 3", "warmup_stepz = 3", ["warmup_stepz", "warmup_steps"]),
            ("warmup_steps = 3", 'warmup_steps = "few"', ["train.warmup_steps", "few"]),
            ("heads = 2", "heads = -2", ["model.heads", "-2"]),
            ("heads = 2", "heads = ", ["tiny.toml", "line"]),
        ],
    )
    def test_a_bad_profile(self, tiny: Path, line: str, broken: str, hints: list[str]) -> None:
        assert line in tiny.read_text()
        tiny.write_text(tiny.read_text().replace(line, broken))
        said = self.refused(tiny)
        assert all(hint in said for hint in [*hints, "tiny.toml"]), said

    def test_a_name_that_is_taken(self, trained: Trained) -> None:
        before = trained.run.log_path.read_bytes()
        done = retention_tui("run", trained.profile, "--name", "tiny", "--headless", "--runs-dir", trained.folder)
        assert done.returncode == 2
        assert "run tiny exists already" in the_one_line(done)
        assert trained.run.log_path.read_bytes() == before


def test_two_processes_never_train_one_run(tiny: Path, tmp_path: Path) -> None:
    runs = ["--runs-dir", str(tmp_path / "runs")]
    long = settings("train.steps=1000000")
    first = subprocess.Popen(
        [*COMMAND, "run", str(tiny), *long, "--headless", *runs], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    try:
        run, deadline = RunDirectory(tmp_path / "runs/tiny"), time.monotonic() + 30
        while (run.last("loss") or (0,))[0] < 3 and time.monotonic() < deadline:
            time.sleep(0.05)
        done = retention_tui("resume", "tiny", "--headless", *runs)
        assert done.returncode == 2
        assert "is being trained by another process" in the_one_line(done)
        assert run.is_live() and len(run.attempts()) == 1
        first.send_signal(signal.SIGTERM)
        assert first.wait(30) == 128 + signal.SIGTERM
    finally:
        first.kill()
        first.communicate()


def test_a_diverged_run_is_exit_code_4_and_its_numbers_are_json(trained: Trained, tmp_path: Path) -> None:
    """It begins with weights that are no numbers."""
    folder = tmp_path / "overflowing"
    shutil.copytree(max(trained.run.checkpoints_path.iterdir()), folder)
    spoilt = {name: array * math.nan for name, array in load_file(folder / "model.safetensors").items()}
    save_file(spoilt, folder / "model.safetensors")
    runs = ["--runs-dir", tmp_path / "runs"]
    done = retention_tui("run", trained.profile, *settings(f"model.init_from={folder}"), "--json", *runs)
    assert done.returncode == 4
    assert "training diverged" in the_one_line(done)
    events = [strict_json(line) for line in done.stdout.splitlines()]
    assert [event["metrics"]["loss"] for event in events if event["event"] == "step"] == ["nan"] * 3
    (listed,) = strict_json(retention_tui("runs", "--json", *runs).stdout)
    assert listed["state"] == "failed" and listed["loss"] == "nan"
    shown = strict_json(retention_tui("show", "tiny", "--json", *runs).stdout)
    assert len([alarm for alarm in shown["alarms"] if "was not applied" in alarm["text"]]) == 2
    rows = retention_tui("export", "tiny", "--format", "jsonl", *runs).stdout.splitlines()
    assert [strict_json(row)["step"] for row in rows] == [1, 2, 3]


def test_a_corrupt_checkpoint_falls_back_and_says_so(trained: Trained, tmp_path: Path) -> None:
    run = trained.copy_to(tmp_path)
    newest = max(run.checkpoints_path.iterdir())
    (newest / "model.safetensors").write_bytes((newest / "model.safetensors").read_bytes()[:1000])
    done = retention_tui("resume", "tiny", "--headless", "--runs-dir", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    (said,) = [line for line in done.stdout.splitlines() if "falling back" in line]
    assert newest.name in said and "model.safetensors" in said
    assert run.curve("loss")[1].tolist() == trained.run.curve("loss")[1].tolist()


class TestARunThatHasEnded:
    def test_its_events_are_json_lines(self, trained: Trained) -> None:
        assert [event["step"] for event in trained.events if event["event"] == "step"] == list(range(1, 13))
        assert trained.events[-1]["event"] == "run_ended" and trained.events[-1]["state"] == "finished"

    def test_show(self, trained: Trained) -> None:
        shown = trained.ask("show", "tiny")
        for part in ("tiny", "finished", "12 of 12", "step-0000010", "step-0000012", "best", f"{trained.folder}"):
            assert part in shown

    def test_show_as_json(self, trained: Trained) -> None:
        shown = strict_json(trained.ask("show", "tiny", "--json"))
        losses = [event["metrics"]["loss"] for event in trained.events if event["event"] == "step"]
        assert (shown["state"], shown["step"], shown["loss"]) == ("finished", 12, losses[-1])
        assert [checkpoint["step"] for checkpoint in shown["checkpoints"]] == [10, 12]
        assert shown["identity"]["profile"]["train"]["steps"] == 12
        assert [attempt["state"] for attempt in shown["attempts"]] == ["finished"]

    def test_runs(self, trained: Trained) -> None:
        (listed,) = strict_json(trained.ask("runs", "--json"))
        assert (listed["name"], listed["state"], listed["step"], listed["live"]) == ("tiny", "finished", 12, False)
        _, row = trained.ask("runs").splitlines()
        assert row.split()[:4] == ["tiny", "finished", "12", "of"]

    def test_generate(self, trained: Trained) -> None:
        ask = ["generate", "tiny", "-p", "The with statement", "--max-tokens", "40"]
        greedy, again = (trained.ask(*ask, "--temperature", "0") for _ in range(2))
        assert greedy == again and len(greedy) > 10
        warm = [trained.ask(*ask, "--temperature", "1", "--seed", seed) for seed in ("1", "1", "2")]
        assert warm[0] == warm[1] != warm[2]

    def test_export(self, trained: Trained, tmp_path: Path) -> None:
        """One row a step, and every number exactly as it was measured."""
        stored = dict(trained.run.rows())
        assert list(stored) == list(range(1, 13))
        trained.ask("export", "tiny", "-o", tmp_path / "run.csv")
        written = (tmp_path / "run.csv").read_text(encoding="utf-8")
        rows = list(csv.DictReader(written.splitlines()))
        assert next(iter(rows[0])) == "step"
        assert {
            int(row.pop("step")): {name: float(text) for name, text in row.items() if text} for row in rows
        } == stored
        assert csv.reader(trained.ask("export", "tiny").splitlines()).__next__() == [
            "step",
            *trained.run.metric_names(),
        ]
        lines = [strict_json(line) for line in trained.ask("export", "tiny", "--format", "jsonl").splitlines()]
        assert {line.pop("step"): line for line in lines} == stored
        said = [event["metrics"]["loss"] for event in trained.events if event["event"] == "step"]
        assert [stored[step]["loss"] for step in stored] == said and all(map(math.isfinite, said))

    def test_an_unknown_format_is_refused(self, trained: Trained) -> None:
        done = retention_tui("export", "tiny", "--format", "xml", "--runs-dir", trained.folder)
        assert done.returncode == 2 and "csv, jsonl" in the_one_line(done)
