"""The wheel is whole: installed alone, and run from elsewhere, it finds its commands, styles and profiles."""

from __future__ import annotations

import os
import shutil
import site
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    # A copy, because a build in place may pick up what an older one left there.
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".git", ".venv", ".*_cache", "__pycache__", "runs"))
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(source)], check=True)
    (built,) = folder.glob("retention_tui-*.whl")
    return built


def test_holds_everything(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = {f"engine/profiles/{path.name}" for path in ROOT.glob("profiles/*.toml")}
    for package in ("engine", "retention_tui"):
        for path in (ROOT / package).rglob("*"):
            if path.suffix in (".py", ".tcss", ".toml"):
                wanted.add(path.relative_to(ROOT).as_posix())
    assert "engine/profiles/demo.toml" in wanted
    assert any(name.endswith(".tcss") for name in wanted) and "engine/planning/known_bases.toml" in wanted
    assert wanted <= names
    assert not any(name.startswith(("tests/", "profiles/")) for name in names)


def test_runs_from_another_folder(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=False, symlinks=True)
    python = tmp_path / "venv/bin/python"
    target = ["--python", str(python), "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", *target], check=True)

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(elsewhere),
        # The dependencies come from the environment of the tests; its .pth files, which lead to this checkout, do not.
        "PYTHONPATH": os.pathsep.join(site.getsitepackages()),
    }
    code = "import engine, retention_tui; print(engine.__file__, retention_tui.__file__)"
    found = subprocess.run(
        [python, "-c", code], cwd=elsewhere, env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert found.count(str(tmp_path)) == 2

    done = subprocess.run(
        [tmp_path / "venv/bin/retention-tui", "profiles"],
        cwd=elsewhere, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for path in ROOT.glob("profiles/*.toml"):
        assert path.stem in done.stdout
