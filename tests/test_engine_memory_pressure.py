"""Real pressure: a run in a memory control group with a limit, beside a process that eats what is left of it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from fault_campaign import KEEP, Life

LIMIT_BYTES = 400_000_000
GROUPS = Path("/sys/fs/cgroup")
EATER = """
import sys
eaten = []
for line in sys.stdin:
    eaten = [*eaten, b"x" * int(line)] if int(line) else []
    print(len(eaten), flush=True)
"""
SETTINGS = {"checkpoint.every": 10, "checkpoint.keep": KEEP, "validate.every": 0, "train.steps": 100_000}
AT_ONCE = {f"guard.memory.{level}_seconds": 0 for level in ("yellow", "red", "green")}


@dataclass
class Group:
    """A memory control group, of whichever version can be made here."""

    folder: Path
    version: int

    def join(self, *command: str) -> list[str]:
        """A command that runs another in this group."""
        return ["sh", "-c", f'echo 0 > {self.folder}/cgroup.procs && exec "$@"', "sh", *command]

    def used_bytes(self) -> int:
        return int((self.folder / ("memory.current" if self.version == 2 else "memory.usage_in_bytes")).read_text())

    def killed(self) -> int:
        """How many of its processes the kernel has killed."""
        text = (self.folder / ("memory.events" if self.version == 2 else "memory.oom_control")).read_text()
        return int(dict(line.split() for line in text.splitlines()).get("oom_kill", 0))


@pytest.fixture
def group() -> Iterator[Group]:
    for version, parent, limit, swap in (
        (2, GROUPS, "memory.max", ("memory.swap.max", 0)),
        (1, GROUPS / "memory", "memory.limit_in_bytes", ("memory.memsw.limit_in_bytes", LIMIT_BYTES)),
    ):
        folder = parent / f"retention-tui-pressure-{os.getpid()}"
        with suppress(OSError):
            folder.mkdir()
            if (folder / limit).exists():
                (folder / limit).write_text(str(LIMIT_BYTES))
                with suppress(OSError):  # not every kernel counts swap
                    (folder / swap[0]).write_text(str(swap[1]))
                yield Group(folder, version)
                deadline = time.monotonic() + 10
                while (folder / "cgroup.procs").read_text() and time.monotonic() < deadline:
                    time.sleep(0.05)
                folder.rmdir()
                return
            folder.rmdir()
    pytest.skip("no memory control group can be made here: needs root, and the memory controller")


class Eater:
    """A process in the group that takes memory and gives it back."""

    def __init__(self, group: Group) -> None:
        command = group.join(sys.executable, "-c", EATER)
        self._group = group
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)

    def eat(self, size_bytes: int) -> None:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(f"{size_bytes}\n")
        self._process.stdout.readline()

    def leave(self, room_bytes: int) -> None:
        """Takes all but so much of the group's limit."""
        self.eat(max(1, LIMIT_BYTES - self._group.used_bytes() - room_bytes))

    def give_back(self) -> None:
        self.eat(0)

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture
def eater(group: Group) -> Iterator[Eater]:
    eater = Eater(group)
    yield eater
    eater.end()


@pytest.fixture
def life(shared_tiny: Path, tmp_path: Path, group: Group) -> Iterator[Life]:
    life = Life(tmp_path / "life", shared_tiny, SETTINGS | AT_ONCE)
    yield life
    life.put_down()


@pytest.fixture(scope="module")
def alone(shared_tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The first losses of the same run with room to spare."""
    life = Life(tmp_path_factory.mktemp("alone") / "life", shared_tiny, SETTINGS)
    life.start()
    life.until_steps(80)
    life.kill()
    return life.run.curve("loss")[1].tolist()


def test_the_guard_acts_before_the_limit(life: Life, group: Group, eater: Eater, alone: list[float]) -> None:
    life.start(under=group.join())
    life.until_steps(3)
    eater.leave(int(LIMIT_BYTES * 0.08))
    life.until(lambda: "micro-batch" in life.alarms(), "yellow pressure")
    assert "cache cleared" in life.alarms()
    eater.leave(int(LIMIT_BYTES * 0.03))
    life.until(lambda: life.events("state")[-1]["state"] == "paused", "pause")
    assert life.checkpoints()[-1].step == life.events("step")[-1]["step"]
    taken = len(life.events("step"))
    eater.give_back()
    life.until_steps(taken + 3)
    assert "going on" in life.log()
    life.send(15)
    life.end(128 + 15)
    assert group.killed() == 0
    assert life.check() == []
    losses = life.run.curve("loss")[1].tolist()
    compared = min(len(losses), len(alone))
    assert losses[:compared] == pytest.approx(alone[:compared], abs=1e-4)


def test_where_the_kernel_kills_all_the_same_the_run_goes_on_whole(
    life: Life, group: Group, eater: Eater, alone: list[float]
) -> None:
    """In one gulp, faster than anything that looks once a second."""
    life.start(under=group.join())
    life.until(lambda: len(life.events("checkpoint")) >= 2, "checkpoints")
    Path(f"/proc/{life.pid}/oom_score_adj").write_text("1000")  # the one that the kernel chooses
    eater.leave(-30_000_000)
    life.end(-9)
    assert group.killed() >= 1  # at times the eater too
    assert life.check() == []
    newest = life.checkpoints()[-1].step
    life.start()
    life.until_steps(5)
    assert life.events("run_opened")[0]["step"] == newest
    life.send(15)
    life.end(128 + 15)
    assert life.check() == []
    losses = life.run.curve("loss")[1].tolist()
    compared = min(len(losses), len(alone))
    assert len(losses) >= newest + 5
    assert losses[:compared] == alone[:compared]
