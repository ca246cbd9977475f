"""Runs that are hurt again and again, for test_engine_faults.py: one `Life` is one run until it has finished."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from engine.checkpoint import Checkpoint, list_checkpoints
from engine.errors import UserError
from engine.store import RunDirectory

KEEP = 3
SETTINGS = {
    **{"model.layers": 1, "model.width": 16, "model.heads": 1, "train.sequence_length": 16},
    **{"train.batch_size": 2, "train.micro_batch_size": 1, "validate.every": 20, "validate.batches": 1},
    **{"checkpoint.every": 6, "checkpoint.keep": KEEP},
}
"""Of runs that are as small and write as often as can be."""
PATIENCE_SECONDS = 120
DISK_BYTES = 4_000_000
COLUMNS = ("step", "loss", "grad_norm", "val_loss", "val_bits_per_byte", "trained_tokens", "learning_rate")


class Missed(Exception):
    """The run was over before the fault could strike."""


def run_command(*arguments: str | Path, inject: str | None = None) -> list[str]:
    """The command line, as it is or with what `fault_injection` makes of it. Its runs are beside a profile."""
    script = [str(Path(__file__).with_name("fault_injection.py")), inject or "", str(arguments[-1])]
    return [sys.executable, *(script if inject else ["-m", "retention_tui"]), *map(str, arguments)]


def new_run(profile: Path, name: str, settings: Mapping[str, object]) -> list[str]:
    return ["run", str(profile), "--name", name, *(f"--set={key}={value}" for key, value in settings.items())]


def exported(runs: Path, name: str) -> list[tuple[str, ...]]:
    """What must be the same after any fault, for every step, as the export writes it: in full precision."""
    done = subprocess.run(run_command("export", name, "--runs-dir", runs), capture_output=True, text=True, check=True)
    return [tuple(row[name] for name in COLUMNS) for row in csv.DictReader(done.stdout.splitlines())]


class Life:
    """One run in a folder of its own, hurt while it trains or while it is down, and started again."""

    def __init__(self, folder: Path, profile: Path, settings: Mapping[str, object]) -> None:
        folder.mkdir()
        self.runs = folder / "runs"
        self.run = RunDirectory(self.runs / "hurt")
        self.damaged: set[Path] = set()
        self._waiting = self.run.path / "waiting.json"
        self._new = new_run(profile, "hurt", settings)
        self._said, self._errors = folder / "said", folder / "errors"
        self._process: subprocess.Popen[bytes] | None = None
        self._intact: set[int] = set()
        self._cut_off = self._may_fail = self._unnoted = False
        self._log_before = self._heard_bytes = 0
        self._heard: list[dict[str, Any]] = []

    # A process's life

    def start(self, inject: str | None = None, under: Sequence[str] = (), may_fail: bool = False) -> None:
        """Starts the run, or goes on with it; `under` is a command that takes another one.

        One that may fail may end with a line instead of its last checkpoint, or of its first.
        """
        self._may_fail = may_fail
        attempts = self.run.attempts() if self.run.path.exists() else []
        ended = bool(attempts) and attempts[-1].state in ("finished", "stopped", "failed")
        self._cut_off = bool(attempts) and not ended and not self._waiting.exists()
        self._intact = {item.step for item in self.checkpoints() if item.path not in self.damaged}
        self._log_before = self.run.log_path.stat().st_size if self.run.log_path.exists() else 0
        self._heard_bytes, self._heard = 0, []
        arguments = ["resume", "hurt"] if self.run.identity_path.exists() else self._new
        command = run_command(*arguments, "--json", "--runs-dir", self.runs, inject=inject)
        with self._said.open("wb") as said, self._errors.open("wb") as errors:
            self._process = subprocess.Popen([*under, *command], stdout=said, stderr=errors)

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def until(self, condition: Callable[[], Any], what: str, pause_seconds: float = 0.005) -> None:
        """Waits for something that happens while the process lives."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            if not self.alive:
                self.end(0, *([2] if self._may_fail else []))
                if condition():  # its last words
                    break
                raise Missed(what)
            assert time.monotonic() < deadline, f"{what}: not in {PATIENCE_SECONDS} s; {self.log()[-2000:]}"
            time.sleep(pause_seconds)

    def until_steps(self, steps: int) -> None:
        """Waits until this process has taken so many steps."""
        self.until(lambda: len(self.events("step")) >= steps, f"{steps} steps")

    def send(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def end(self, *codes: int) -> None:
        """Waits for the process; it must end with one of these codes, a failure in one line."""
        assert self._process is not None
        code = self._process.wait(PATIENCE_SECONDS)
        errors = self._errors.read_text(errors="replace")
        assert code in codes, f"exit code {code} instead of {codes}: {errors}{self.log()[-2000:]}"
        assert "Traceback" not in errors and (code != 2 or errors.count("\n") == 1), errors

    def kill(self) -> None:
        """Ends it the hard way, where it has not ended by itself."""
        self.send(signal.SIGKILL)
        self.end(-signal.SIGKILL, 0)

    def put_down(self) -> None:
        """Leaves no process behind."""
        if self.alive:
            self.kill()

    @property
    def finished(self) -> bool:
        """Whether all steps have been taken, and it knows."""
        attempts = self.run.attempts() if self.run.path.exists() else []
        return bool(attempts) and attempts[-1].state == "finished"

    def finish(self) -> None:
        """Goes on to the end."""
        self.start()
        self.end(0)

    # What it says and leaves

    def events(self, kind: str) -> list[dict[str, Any]]:
        """What the present process has said of one kind."""
        with self._said.open("rb") as said:
            said.seek(self._heard_bytes)
            for line in said:
                if not line.endswith(b"\n"):
                    break  # half a line: its other half would pass for a line of its own
                self._heard_bytes += len(line)
                self._heard.append(json.loads(line))
        return [event for event in self._heard if event["event"] == kind]

    def alarms(self) -> str:
        return "\n".join(event["text"] for event in self.events("alarm"))

    def log(self) -> str:
        """What the present process has written to the log."""
        with suppress(FileNotFoundError):
            return self.run.log_path.read_bytes()[self._log_before :].decode(errors="replace")
        return ""

    def checkpoints(self) -> list[Checkpoint]:
        return list_checkpoints(self.run) if self.run.path.exists() else []

    def intact(self) -> list[Checkpoint]:
        """The checkpoints on its line that verify, oldest first."""
        whole = []
        for checkpoint in self.checkpoints():
            with suppress(UserError):
                checkpoint.verify()
                whole.append(checkpoint)
        return whole

    def check(self) -> list[str]:
        """After a fault, down: nothing half-written counts. Returns what is missing of what had been saved."""
        if not self.run.path.exists():
            return []
        assert self.run.identity()["name"] == "hurt"
        if self._cut_off and self.events("run_opened"):
            assert "was cut off" in self.log(), self.log()
        whole = {item.step for item in self.intact()}
        said = {event["step"] for event in self.events("checkpoint")}
        known = sorted(self._intact | said | whole)
        scores = dict(zip(*(column.tolist() for column in self.run.curve("val_loss")), strict=True))
        best = min((step for step in known if step in scores), key=scores.__getitem__, default=None)
        self._unnoted |= "state.json could not be written" in self.alarms()  # a score of a step that was saved before
        kept = {*known[-KEEP:], *([best] if best is not None and not self._unnoted else [])}
        sound = [item for item in self.checkpoints() if item.path not in self.damaged]
        lost = [f"{item.path.name} is damaged" for item in sound if item.step not in whole]
        lost += [f"step {step} is gone" for step in sorted(kept) if step not in whole]
        steps = self.run.curve("loss")[0].tolist()
        assert steps == list(range(1, len(steps) + 1)), f"steps on the curve: {steps}"
        assert self._waiting.exists() or len(steps) >= max(whole, default=0), "a checkpoint is newer than the curve"
        return lost


# Disks


def can_mount() -> bool:
    """Whether small disks can be made here, and folders read-only: as root, in most containers not."""
    if os.geteuid() or not sys.platform.startswith("linux"):
        return False
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(["mount", "-t", "tmpfs", "none", folder], capture_output=True, check=False)
        if done.returncode == 0:
            subprocess.run(["umount", folder], check=True)
    return done.returncode == 0


@contextmanager
def small_disk(place: Path) -> Iterator[None]:
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "none", place], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


@contextmanager
def full(disk: Path) -> Iterator[None]:
    """Leaves no room on a small disk."""
    ballast = disk / ".ballast"
    with ballast.open("wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(4096)):
            pass
    try:
        yield
    finally:
        ballast.unlink()


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """A folder in which nothing can be written: by its permissions or, as those do not bind root, by a mount."""
    if os.geteuid():
        folder.chmod(0o555)
        try:
            yield
        finally:
            folder.chmod(0o755)
        return
    subprocess.run(["mount", "--bind", folder, folder], check=True)
    try:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while subprocess.run(["mount", "-o", "remount,bind,ro", folder], capture_output=True, check=False).returncode:
            assert time.monotonic() < deadline  # a file in it is open for writing
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)
