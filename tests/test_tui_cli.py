"""The command line: what it loads, and how it answers to what is no command."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest


def retention_tui(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "retention_tui", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


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
    assert done.stderr.startswith("retention-tui: ") and done.stderr.count("\n") == 1
    assert hint in done.stderr
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
