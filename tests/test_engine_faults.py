"""The fault campaign: runs killed, starved, damaged and resumed end with the losses of one that was left alone.

Bit for bit, and no checkpoint is lost but the one in flight. Each kind of fault once with the tests; the long form:
`RETENTION_TUI_FAULTS=200 pytest tests/test_engine_faults.py tests/test_engine_crash_points.py`.
"""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest
from fault_campaign import (
    SETTINGS,
    Life,
    Missed,
    can_mount,
    exported,
    full,
    new_run,
    read_only,
    run_command,
    small_disk,
)

from engine.errors import UserError

FAULTS = int(os.environ.get("RETENTION_TUI_FAULTS", "0"))
SEED = int(os.environ.get("RETENTION_TUI_FAULTS_SEED", "0"))
STEPS = 400 if FAULTS else 180
NO_ROOM, NO_WRITING, BROKEN = "No space left on device", "Read-only file system|Permission denied", "Input/output error"


# Signals


def killed_at_the_start(life: Life, chance: Random) -> None:
    life.start()
    time.sleep(chance.uniform(0, 1.2))
    life.kill()


def killed_at_work(life: Life, chance: Random) -> None:
    life.start()
    life.until_steps(1)
    time.sleep(chance.uniform(0, 0.5))
    life.kill()


def killed_while_writing(life: Life, chance: Random) -> None:
    killed_beside(life, chance, ".writing-*")


def killed_while_deleting(life: Life, chance: Random) -> None:
    killed_beside(life, chance, ".deleting-*")


def killed_beside(life: Life, chance: Random, leftover: str) -> None:
    life.start()
    life.until_steps(chance.randrange(1, 20))
    place = life.run.checkpoints_path
    life.until(lambda: any(place.glob(leftover)), leftover, pause_seconds=0)
    time.sleep(chance.choice([0, chance.uniform(0, 0.01)]))
    life.kill()


def terminated(life: Life, chance: Random) -> None:
    stopped_by(life, chance, signal.SIGTERM)


def interrupted(life: Life, chance: Random) -> None:
    stopped_by(life, chance, signal.SIGINT)


def stopped_by(life: Life, chance: Random, number: signal.Signals) -> None:
    """At any moment; before the handlers are set nothing has begun, and the signal ends the process as such."""
    life.start()
    time.sleep(chance.uniform(0, 2))
    at_work = bool(life.events("step"))
    stop(life, number)
    if at_work and life.events("step")[-1]["step"] < STEPS:
        assert f"stopped by {number.name}" in life.log()
        assert life.checkpoints()[-1].step == life.events("step")[-1]["step"]


def stop(life: Life, number: signal.Signals = signal.SIGTERM, *others: int) -> None:
    life.send(number)
    life.end(128 + number, -number, 0, *others)


def hung_up(life: Life, chance: Random) -> None:
    """A lost terminal never ends a run."""
    life.start()
    life.until_steps(1)
    life.send(signal.SIGHUP)
    life.until_steps(len(life.events("step")) + chance.randrange(3, 20))
    life.kill()


# A process whose writes fail


def vanished(life: Life, chance: Random) -> None:
    life.start(f"exit@{chance.randrange(1, 400)}")
    life.end(137, 0)


def failing_sync(life: Life, chance: Random) -> None:
    failing(life, chance, "fsync", 25)


def failing_rename(life: Life, chance: Random) -> None:
    failing(life, chance, chance.choice(["rename", "replace"]), 4)


def failing_arrays(life: Life, chance: Random) -> None:
    failing(life, chance, "save", 6)


def failing_commit(life: Life, chance: Random) -> None:
    failing(life, chance, "commit", 30)


def failing(life: Life, chance: Random, call: str, latest: int) -> None:
    first = chance.randrange(1, latest)
    life.start(f"{call}:5@{first}-{first + chance.randrange(1, 12)}", may_fail=True)
    with suppress(Missed):  # a run that cannot be opened is refused in one line
        life.until(lambda: BROKEN in life.alarms(), "alarm")
        assert "could not be written" in life.alarms() and BROKEN in life.log()
        life.until_steps(len(life.events("step")) + chance.randrange(1, 40))
        stop(life, signal.SIGTERM, 2)
        return
    life.end(2, 0)


def short_writes(life: Life, chance: Random) -> None:
    """Files that may not grow beyond a limit: the kernel takes a part of what is written and refuses the rest."""
    life.start(may_fail=True)
    life.until_steps(chance.randrange(1, 20))
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with suppress(ProcessLookupError):
        resource.prlimit(life.pid, resource.RLIMIT_FSIZE, (chance.randrange(1, 70_000), hard))
        life.until(lambda: "could not be written" in life.alarms(), "alarm")
        if chance.random() < 0.5:
            resource.prlimit(life.pid, resource.RLIMIT_FSIZE, (hard, hard))
            life.until_steps(len(life.events("step")) + 10)
            stop(life)
        else:
            life.kill()


# Disks


def full_for_a_while(life: Life, chance: Random) -> None:
    life.start(may_fail=True)
    life.until_steps(chance.randrange(1, 30))
    with full(life.runs):
        life.until(lambda: NO_ROOM in life.alarms() or "disk is full" in life.alarms(), "alarm")
    saved = len(life.events("checkpoint"))
    life.until(lambda: len(life.events("checkpoint")) > saved, "checkpoint")
    stop(life)


def full_and_killed(life: Life, chance: Random) -> None:
    life.start(may_fail=True)
    life.until_steps(chance.randrange(1, 30))
    with full(life.runs):
        life.until(lambda: NO_ROOM in life.alarms() or "disk is full" in life.alarms(), "alarm")
        life.until_steps(len(life.events("step")) + chance.randrange(1, 30))
        life.kill()


def full_and_stopped(life: Life, chance: Random) -> None:
    life.start(may_fail=True)
    life.until_steps(chance.randrange(1, 30))
    with full(life.runs):
        life.until(lambda: NO_ROOM in life.alarms() or "disk is full" in life.alarms(), "alarm")
        life.until_steps(len(life.events("step")) + chance.randrange(1, 10))
        stop(life, signal.SIGTERM, 2)


def read_only_at_work(life: Life, chance: Random) -> None:
    life.start(may_fail=True)
    life.until(lambda: len(life.events("checkpoint")) >= 1, "checkpoint")
    with read_only(life.run.checkpoints_path):
        life.until(lambda: re.search(NO_WRITING, life.alarms()), "alarm")
        stop(life, signal.SIGTERM, 2)


def read_only_at_the_start(life: Life, chance: Random) -> None:
    killed_at_work(life, chance)
    with read_only(life.run.path):
        life.start()
        life.end(2)
    assert life.run.identity()


# Damage while it is down


def damaged_checkpoint(life: Life, chance: Random) -> None:
    ready(life, chance)
    newest, before = life.intact()[-1], life.intact()[-2]
    file = chance.choice(sorted(newest.path.iterdir()))
    content = file.read_bytes()
    match chance.choice(["flip", "flip", "truncate", "empty", "remove", "garbage"]):
        case "flip":
            place, bit = chance.randrange(len(content)), 1 << chance.randrange(8)
            file.write_bytes(content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :])
        case "truncate":
            file.write_bytes(content[: chance.randrange(len(content))])
        case "empty":
            file.write_bytes(b"")
        case "remove":
            file.unlink()
        case "garbage":
            file.write_bytes(chance.randbytes(len(content)))
    with suppress(UserError):
        newest.verify()
        return  # another kind of white space
    life.damaged.add(newest.path)
    life.start()
    life.until(lambda: life.events("run_opened"), "opening")
    assert life.events("run_opened")[0]["step"] == before.step
    assert f"{newest.path.name} is damaged: {file.name}" in life.log() and "falling back" in life.log()
    stop(life)


def damaged_store_log(life: Life, chance: Random) -> None:
    """The part of the store that SQLite has not yet put into its main file is cut off, spoilt or lost."""
    ready(life, chance)
    log = Path(f"{life.run.database_path}-wal")
    content = log.read_bytes()
    match chance.choice(["remove", "truncate", "garbage"]):
        case "remove":
            log.unlink()
        case "truncate":
            log.write_bytes(content[: chance.randrange(len(content) + 1)])
        case "garbage":
            place = chance.randrange(len(content) + 1)
            log.write_bytes(content[:place] + chance.randbytes(len(content) - place))
    if chance.random() < 0.5:
        Path(f"{life.run.database_path}-shm").unlink(missing_ok=True)


def ready(life: Life, chance: Random) -> None:
    """Killed, with two checkpoints at least."""
    life.start()
    life.until(lambda: len(life.intact()) >= 2 and life.events("step"), "two checkpoints")
    time.sleep(chance.uniform(0, 0.2))
    life.kill()
    life.check()


Fault = Callable[[Life, Random], None]
ANYWHERE: list[Fault] = [
    *(killed_at_the_start, killed_at_work, killed_while_writing, killed_while_deleting, terminated, interrupted),
    *(hung_up, vanished, failing_sync, failing_rename, failing_arrays, failing_commit),
    *(damaged_checkpoint, damaged_store_log),
]
ON_LINUX: list[Fault] = [short_writes]
READ_ONLY: list[Fault] = [read_only_at_work, read_only_at_the_start]
ON_A_SMALL_DISK: list[Fault] = [full_for_a_while, full_and_killed, full_and_stopped]


@dataclass
class Result:
    """What came of one fault."""

    kind: str
    resumed: bool = False
    lost: int = 0
    equal: bool = False


class Campaign:
    """Faults in a row, on one run after the other, each hurt until it has finished all the same."""

    def __init__(self, folder: Path, profile: Path, alone: list[tuple[str, ...]]) -> None:
        self._folder, self._profile, self._alone = folder, profile, alone
        self.results: list[Result] = []
        self.failures: list[str] = []
        self.lives = 0
        self._began = time.monotonic()

    def work(self, name: str, faults: Sequence[Fault], on_small_disks: bool) -> None:
        """Carries out faults; those for which a run ended too early strike the next one."""
        chance, waiting = Random(f"{SEED} {name}"), deque(faults)
        while waiting:
            self.lives += 1
            life = Life(self._folder / f"{name}-{self.lives}", self._profile, SETTINGS | {"train.steps": STEPS})
            with small_disk(life.runs) if on_small_disks else nullcontext():
                try:
                    self._live(life, waiting, chance)
                finally:
                    life.put_down()

    def _live(self, life: Life, waiting: deque[Fault], chance: Random) -> None:
        suffered: list[Result] = []
        fault: Fault | None = None
        try:
            while waiting and not life.finished:
                fault = waiting.popleft()
                result = Result(fault.__name__.replace("_", " "))
                try:
                    fault(life, chance)
                except Missed:
                    waiting.appendleft(fault)
                    continue
                suffered.append(result)
                result.lost = len(life.check())
            fault = None
            if not life.finished:
                life.finish()
            rows = exported(life.runs, "hurt")
            for result in suffered:
                result.resumed, result.equal = True, rows == self._alone
        except Exception as error:
            self.failures.append(
                f"{fault.__name__ if fault else 'the end'} in {life.runs}: {type(error).__name__}: {error}"
            )
        self.results += suffered

    def table(self) -> str:
        """What is printed: how many faults of each kind, and what came of them."""
        lines = [f"{'fault':24} {'count':>6} {'resumed':>8} {'checkpoints lost':>17} {'losses equal':>13}"]
        for kind in [*sorted({result.kind for result in self.results}), "all"]:
            some = [result for result in self.results if kind in (result.kind, "all")]
            resumed, equal = sum(result.resumed for result in some), sum(result.equal for result in some)
            lost = sum(result.lost for result in some)
            lines.append(f"{kind:24} {len(some):6} {resumed:8} {lost:17} {equal:13}")
        return "\n".join([*lines, f"in {self.lives} runs of {STEPS} steps, {time.monotonic() - self._began:.0f} s"])


@pytest.mark.timeout(400 + 10 * FAULTS)
def test_runs_that_are_hurt_end_like_one_that_was_left_alone(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs, settings = tmp_path / "runs", SETTINGS | {"train.steps": STEPS}
    alone = run_command(*new_run(tiny, "alone", settings), "--headless", "--runs-dir", runs)
    subprocess.run(alone, check=True, capture_output=True)
    mountable = can_mount()
    hurting = [
        *ANYWHERE,
        *(ON_LINUX if sys.platform == "linux" else []),
        *(READ_ONLY if mountable or os.geteuid() else []),
    ]
    disks = ON_A_SMALL_DISK if mountable else []
    left_out = {*ON_LINUX, *READ_ONLY, *ON_A_SMALL_DISK} - {*hurting, *disks}
    times = max(1, -(-FAULTS // len([*hurting, *disks])))
    hurting, disks = hurting * times, disks * times
    Random(SEED).shuffle(hurting)
    middle = (len(hurting) + len(disks)) // 2
    plain, small = hurting[:middle], [*hurting[middle:], *disks]
    Random(SEED).shuffle(small)
    campaign = Campaign(tmp_path, tiny, exported(runs, "alone"))
    with ThreadPoolExecutor(2) as workers:  # two at once: each waits a good part of its time
        parts = [("disk", small, bool(disks)), ("plain", plain, False)]
        for done in [workers.submit(campaign.work, *part) for part in parts]:
            done.result()
    with capsys.disabled():
        print(f"\n{campaign.table()}")
        if left_out:
            print("left out, as this machine does not allow them:", *(fault.__name__ for fault in left_out))
    if campaign.failures:
        pytest.fail("\n".join(campaign.failures), pytrace=False)
    assert len(campaign.results) == len(plain) + len(small)
    for result in campaign.results:
        assert (result.resumed, result.lost, result.equal) == (True, 0, True), result
