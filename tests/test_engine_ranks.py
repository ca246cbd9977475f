"""Two processes train one run: equal weights, those of one process at the same effective batch, and a common end."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from engine.store import RunDirectory
from retention_tui.session import Session

LAUNCH = [str(Path(sys.executable).parent / "mlx.launch"), "--backend", "ring", "-n"]
COMMAND = [sys.executable, "-m", "retention_tui"]
PATIENCE_SECONDS = 60


def ports(count: int) -> list[int]:
    """Free ports, so that tests may run beside each other."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    free = [listener.getsockname()[1] for listener in sockets]
    for listener in sockets:
        listener.close()
    return free


def finish(process: subprocess.Popen[str], seconds: float = PATIENCE_SECONDS) -> tuple[str, str]:
    """What a process that leads its session printed; nothing of the session survives, in whatever way it ends."""
    try:
        return process.communicate(timeout=seconds)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def launch(ranks: int, *command: str) -> subprocess.Popen[str]:
    if ranks > 1:
        command = (*LAUNCH, str(ranks), "--starting-port", str(min(ports(2))), "--", *command)
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def begin(folder: Path, ranks: int, *arguments: str) -> subprocess.Popen[str]:
    return launch(ranks, *COMMAND, *arguments, "--headless", "--runs-dir", str(folder / "runs"))


def train(folder: Path, ranks: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    process = begin(folder, ranks, *arguments)
    output, errors = finish(process)
    return subprocess.CompletedProcess(arguments, process.returncode, output, errors)


def train_alone(folder: Path, name: str, start: list[str]) -> Session:
    """A run of one rank, in this process, which has come to its end."""
    _, profile, *options = start
    session = Session(folder / "runs")
    session.start(profile, options[1::2], name)
    session.finish()
    return session


def weights(run: RunDirectory) -> dict[str, np.ndarray]:
    return load_file(max(run.checkpoints_path.iterdir()) / "model.safetensors")


def settings(*pairs: str) -> list[str]:
    return [part for pair in pairs for part in ("--set", pair)]


def small(profile: Path) -> list[str]:
    # Adam divides every entry by its own size, so rounding alone moves entries whose gradient is nothing but rounding;
    # an epsilon cannot be set, so the learning rate is kept small enough for 1e-5 to mean something: see the assertion.
    pairs = ("train.steps=8", "train.learning_rate=1e-3", "train.batch_size=8", "train.micro_batch_size=2")
    return ["run", str(profile), *settings(*pairs, "checkpoint.every=3")]


@pytest.fixture
def start(tiny: Path) -> list[str]:
    return small(tiny)


@pytest.fixture(scope="module")
def of_two(shared_tiny: Path) -> RunDirectory:
    """A run that two ranks have finished."""
    done = train(shared_tiny.parent, 2, *small(shared_tiny), "--name", "of-two")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("finished at step 8") == 1, "rank 0 alone speaks"
    assert [path.name for path in (shared_tiny.parent / "runs").iterdir()] == ["of-two"], "rank 0 alone writes"
    return RunDirectory(shared_tiny.parent / "runs/of-two")


def test_two_ranks_train_as_one(of_two: RunDirectory, start: list[str], tmp_path: Path) -> None:
    assert train_alone(tmp_path, "of-one", start).ended is not None
    of_one = RunDirectory(tmp_path / "runs/of-one")
    one, two = weights(of_one), weights(of_two)
    for name, array in one.items():
        moved = np.abs(array).max()
        assert np.abs(array - two[name]).max() <= 1e-5 * max(moved, 1), name
    assert [run.identity()["environment"]["ranks"] for run in (of_one, of_two)] == [1, 2]


def test_two_ranks_resume(of_two: RunDirectory, tmp_path: Path) -> None:
    part = RunDirectory(tmp_path / "runs/part")
    shutil.copytree(of_two.path, part.path)
    newer = [path for path in part.checkpoints_path.iterdir() if path.name > "step-0000006"]
    for path in newer:
        (path / "optimizer.safetensors").write_bytes(b"damaged")
    done = train(tmp_path, 2, "resume", "part")
    assert newer and done.returncode == 0, done.stderr
    assert "continues at step" in done.stdout
    whole, again = weights(of_two), weights(part)
    assert all(np.array_equal(array, again[name]) for name, array in whole.items())
    session = Session(tmp_path / "runs")
    session.resume("part")
    assert session.finish() == 0
    assert any("ranks was 2, is 1" in event.get("text", "") for event in part.events())


def test_all_ranks_end_with_the_same_weights(tiny: Path, tmp_path: Path) -> None:
    script = str(Path(__file__).parent / "ranks_apart.py")
    process = launch(2, sys.executable, script, str(tiny), "5", str(tmp_path))
    _, errors = finish(process)
    zero, one = (load_file(tmp_path / f"rank-{rank}.safetensors") for rank in (0, 1))
    assert len(zero) > 20 and zero.keys() == one.keys(), errors
    assert all(np.array_equal(array, one[name]) for name, array in zero.items())


def test_bad_input_ends_all_ranks(start: list[str], tmp_path: Path) -> None:
    wrong = {"data.files=nowhere.txt": "nowhere.txt", "train.batch_size=7": "cannot be shared by 2 ranks"}
    under_way = [begin(tmp_path / f"{number}", 2, *start, "--set", key) for number, key in enumerate(wrong)]
    for process, reason in zip(under_way, wrong.values(), strict=True):
        output, errors = finish(process)
        assert reason in errors
        assert "Traceback" not in errors + output


def test_what_fails_on_rank_0_alone_ends_all(start: list[str], tmp_path: Path) -> None:
    (tmp_path / "runs/taken/by something else").mkdir(parents=True)
    began = time.monotonic()
    done = train(tmp_path, 2, *start, "--name", "taken")
    assert time.monotonic() - began < 12, "the other rank would look for it for 15 s or more"
    assert "run taken exists already" in done.stderr


class Pair:
    """Two ranks without a launcher: nobody ends one because the other has ended."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self._hosts = folder / "hosts.json"
        self._hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in ports(2)]))
        self.ranks: list[subprocess.Popen[str]] = []
        self.run = RunDirectory(folder / "runs/pair")

    def start(self, *arguments: str, rank: int | None = None, **environment: str) -> None:
        """Starts the next rank of the run `pair`."""
        rank = len(self.ranks) if rank is None else rank
        variables = {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(self._hosts)}
        command = [*COMMAND, *arguments, "--headless", "--runs-dir", str(self.folder / "runs")]
        if arguments[0] == "run":
            command += ["--name", "pair"]
        self.ranks.append(
            subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
                env={**os.environ, **variables, **environment},
            )
        )

    def wait_for_step(self, step: int) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while (self.run.last("loss") or (0,))[0] < step:
            assert time.monotonic() < deadline, f"still not at step {step}"
            time.sleep(0.05)

    def checkpoint_of_the_end(self) -> bool:
        last = self.run.last("loss")
        return last is not None and (self.run.checkpoints_path / f"step-{last[0]:07}" / "state.json").is_file()

    def end(self) -> list[tuple[int, str]]:
        """Each rank's exit code and what it wrote to standard error."""
        errors = [finish(rank, 30)[1] for rank in self.ranks]
        return [(rank.returncode, said) for rank, said in zip(self.ranks, errors, strict=True)]


@pytest.fixture
def pairs(tmp_path: Path) -> Iterator[list[Pair]]:
    """Three of them, each in a folder of its own."""
    pairs = [Pair(tmp_path / f"pair-{number}") for number in range(3)]
    yield pairs
    for rank in [rank for pair in pairs for rank in pair.ranks]:
        with suppress(ProcessLookupError):
            os.killpg(rank.pid, signal.SIGKILL)
        rank.communicate()


@pytest.fixture
def pair(pairs: list[Pair]) -> Pair:
    return pairs[0]


FOR_EVER = settings("train.steps=100000", "validate.every=0", "checkpoint.every=0")


def test_a_killed_rank_ends_the_other_with_a_checkpoint(pair: Pair, start: list[str]) -> None:
    for _ in range(2):
        pair.start(*start, *FOR_EVER)
    pair.wait_for_step(3)
    pair.ranks[1].kill()
    (code, errors), _ = pair.end()
    assert code == 2
    assert "another rank is gone" in errors and "Traceback" not in errors
    assert pair.checkpoint_of_the_end()
    assert pair.run.summary().state == "failed"


def test_sigterm_to_any_rank_stops_all_with_a_checkpoint(pair: Pair, start: list[str]) -> None:
    for _ in range(2):
        pair.start(*start, *FOR_EVER)
    pair.wait_for_step(3)
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        pair.ranks[1].send_signal(number)
    (code, errors), (other, others) = pair.end()
    assert (code, other) == (0, 128 + signal.SIGTERM), errors + others
    assert pair.checkpoint_of_the_end()
    assert pair.run.attempts()[-1].reason == "another rank was asked to stop"


def test_a_rank_that_waits_for_another_can_be_ended(pairs: list[Pair], start: list[str]) -> None:
    """For one that hangs; and, either of them alone, for one that never comes."""
    hanging, *lonely = pairs
    for _ in range(2):
        hanging.start(*start, *FOR_EVER)
    hanging.wait_for_step(3)
    hanging.ranks[1].send_signal(signal.SIGSTOP)
    hanging.ranks[0].send_signal(signal.SIGTERM)
    for rank, pair in enumerate(lonely):
        pair.start(*start, *FOR_EVER, rank=rank)
    _, errors = finish(hanging.ranks[0], 30)
    assert hanging.ranks[0].returncode == 128 + signal.SIGTERM
    assert "another rank does not answer" in errors
    for pair in lonely:
        assert pair.ranks[0].poll() is None
        pair.ranks[0].send_signal(signal.SIGTERM)
        assert pair.ranks[0].wait(5) == -signal.SIGTERM


def test_ranks_that_differ_are_refused(pairs: list[Pair], start: list[str]) -> None:
    different = {"train.steps=9": "the same number of steps", "data.heldout_fraction=0.3": "the same data"}
    for pair, difference in zip(pairs, different, strict=False):
        pair.start(*start)
        pair.start(*start, "--set", difference)
    for pair, reason in zip(pairs, different.values(), strict=False):
        ends = pair.end()
        assert [code for code, _ in ends] == [2, 2], ends
        for _, errors in ends:
            (line,) = [line for line in errors.splitlines() if "retention-tui" in line]
            assert reason in line
        assert "rank 1" in ends[1][1]


def test_a_defect_of_a_helping_rank_is_told_on_its_standard_error(pair: Pair, start: list[str]) -> None:
    broken = pair.folder / "broken"
    broken.mkdir()
    (broken / "sitecustomize.py").write_text("import numpy\nnumpy.random.SeedSequence = None")
    path = f"{broken}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    pair.start(*start)
    pair.start(*start, PYTHONPATH=path)
    (chief, _), (code, errors) = pair.end()
    assert (chief, code) == (2, 1)
    assert "Traceback" in errors and "retention-tui: rank 1: internal error: TypeError" in errors
    assert [path.name for path in (pair.folder / "runs").iterdir()] == ["pair"]
    assert "Traceback" not in pair.run.log_path.read_text(encoding="utf-8")


def test_steps_without_a_number_are_counted_on_over_a_resume(pair: Pair, start: list[str]) -> None:
    train_alone(pair.folder, "source", [*start, "--set", "train.steps=1"])
    folder = pair.folder / "spoilt"
    shutil.copytree(max((pair.folder / "runs/source/checkpoints").iterdir()), folder)
    spoilt = {name: array * math.nan for name, array in load_file(folder / "model.safetensors").items()}
    save_file(spoilt, folder / "model.safetensors")
    ended = train_alone(pair.folder, "pair", [*start, *settings(f"model.init_from={folder}")]).ended
    assert ended is not None and ended.exit_code == 4
    for _ in range(2):
        pair.start("resume", "pair")
    ends = pair.end()
    assert [code for code, _ in ends] == [4, 4], ends
    assert pair.run.last("loss")[0] == 4  # type: ignore[index]
