"""Shared fixtures: a run small enough to be trained many times."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from pydoc_data.topics import topics

import pytest

# Tiny matrices gain nothing from a second thread, and tests share their cores with the processes that they start.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from ride import Ride, Start
from tiny_llama import write_tiny_llama

import engine.backend  # noqa: F401  (the fast BLAS must be loaded before anything imports MLX)
from engine.commands import Stop
from engine.environment import environment
from engine.host import Machine
from engine.profile import Profile
from engine.profile_files import load_profile
from engine.runs import create_run
from engine.store import RunDirectory
from retention_tui.session import Session

TINY = """
kind = "retention-lm"
description = "small enough to be trained in a test"

[model]
width = 32
layers = 2
heads = 2
vocab_size = 300

[data]
files = ["text"]

[train]
steps = 12
batch_size = 8
micro_batch_size = 4
sequence_length = 32
learning_rate = 3e-3
warmup_steps = 3

[validate]
every = 5
batches = 2

[checkpoint]
every = 4
keep = 2

[host]
keep_awake = false
"""


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is kept beside runs goes to a folder of this session, also in the processes that tests start."""
    folder = tmp_path_factory.mktemp("cache")
    (folder / "config.toml").touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RETENTION_TUI_CACHE", str(folder))
        patch.setenv("RETENTION_TUI_STATE", str(folder))
        patch.setenv("RETENTION_TUI_CONFIG", str(folder / "config.toml"))
        yield


def write_tiny(folder: Path) -> Path:
    """Writes the file of a tiny profile, with its text beside it."""
    text = folder / "text"
    text.mkdir()
    for index, key in enumerate(sorted(topics)[:12]):
        (text / f"{index:02}.txt").write_text(topics[key], encoding="utf-8")
    profile = folder / "tiny.toml"
    profile.write_text(TINY, encoding="utf-8")
    return profile


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """The file of a tiny profile."""
    return write_tiny(tmp_path)


@pytest.fixture(scope="module")
def shared_tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a tiny profile, for what the tests of a module share."""
    return write_tiny(tmp_path_factory.mktemp("shared"))


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama as a Hugging Face folder, to be read only; `write_tiny_llama` makes others."""
    return write_tiny_llama(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture
def tiny_profile(tiny: Path) -> Callable[..., Profile]:
    """`tiny_profile(**{"train.steps": 3})`: the tiny profile with overrides."""

    def load(**overrides: object) -> Profile:
        return load_profile(str(tiny), [f"{key}={json.dumps(value)}" for key, value in overrides.items()])

    return load


@pytest.fixture
def session(tmp_path: Path) -> Iterator[Session]:
    """The runs of a test's own folder, as the main thread owns them."""
    session = Session(tmp_path / "runs")
    yield session
    session.stop("the test is over")
    session.finish()


@pytest.fixture
def ride(tmp_path: Path) -> Iterator[Callable[..., Ride]]:
    """`ride(profile)`: a run of any profile under way; `resume` goes on with one."""
    rides: list[Ride] = []

    def go(profile: Profile, resume: RunDirectory | None = None, which: str = "latest") -> Ride:
        identity = {"profile": profile.model_dump(mode="json", by_alias=True), "environment": environment()}
        run = resume or create_run(tmp_path / "runs", "run", identity)
        rides.append(Ride(run, profile, which if resume else None))
        return rides[-1]

    yield go
    for run in rides:
        run.send(Stop(checkpoint=False))
        run.end()


@pytest.fixture
def start(tiny_profile: Callable[..., Profile], tmp_path: Path) -> Iterator[Start]:
    """`start(**{"train.steps": 3})`: a tiny run under way; `resume` goes on with one, `machine` is what it watches."""
    rides: list[Ride] = []

    def go(
        resume: RunDirectory | None = None, which: str = "latest", machine: Machine | None = None, **overrides: object
    ) -> Ride:
        profile = tiny_profile(**overrides)
        identity = {"profile": profile.model_dump(mode="json", by_alias=True), "environment": environment()}
        run = resume or create_run(tmp_path / "runs", "tiny", identity)
        rides.append(Ride(run, profile, which if resume else None, machine))
        return rides[-1]

    yield go
    for ride in rides:
        ride.send(Stop(checkpoint=False))
        ride.end()
