"""The rules of the house, kept by tools: layout, names and types, and who may import whom."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
SOURCES = ["engine", "retention_tui", "tests", "docs"]


def check(*command: str | Path) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.fail(f"{done.stdout}\n{done.stderr}", pytrace=False)


def test_lint() -> None:
    check(sys.executable, "-m", "ruff", "check", *SOURCES)


def test_format() -> None:
    check(sys.executable, "-m", "ruff", "format", "--check", *SOURCES)


def test_types() -> None:
    check(sys.executable, "-m", "mypy")


def test_imports() -> None:
    check(BIN / "lint-imports")


@pytest.mark.parametrize("name", ["profile", "commands", "events", "errors", "store"])
def test_what_a_run_is_can_be_read_without_mlx(name: str) -> None:
    check(sys.executable, "-c", f"import sys, engine.{name}; assert 'mlx.core' not in sys.modules")


class TestLock:
    lock = (ROOT / "uv.lock").read_text(encoding="utf-8")

    @pytest.fixture(scope="class")
    def packages(self) -> dict[str, dict[str, Any]]:
        return {package["name"]: package for package in tomllib.loads(self.lock)["package"]}

    def test_has_public_addresses_only(self) -> None:
        assert set(re.findall(r"[a-z]+://[^/\"]+", self.lock)) == {"https://pypi.org", "https://files.pythonhosted.org"}

    def test_satisfies_the_project(self, packages: dict[str, dict[str, Any]]) -> None:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        for text in [*project["dependencies"], *project["optional-dependencies"]["test"]]:
            requirement = Requirement(text)
            assert requirement.specifier.contains(packages[requirement.name]["version"]), text

    @pytest.mark.parametrize("platform", ["macosx_15_0_arm64", "manylinux_2_35_x86_64", "manylinux_2_35_aarch64"])
    def test_covers_the_machines(self, packages: dict[str, dict[str, Any]], platform: str) -> None:
        assert any(platform in wheel["url"] for wheel in packages["mlx"]["wheels"])
