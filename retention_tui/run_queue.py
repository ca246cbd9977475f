"""Profiles that are trained one after the other, each in a fresh process of its own.

How far the queue has come is in a file of the runs folder, written whole at every change, so that a queue that was
stopped or killed can be gone on with:

    runs/queue-20261121-231200.json    {"format": 1, …, "entries": [{"profile": "demo", "state": "pending", …}, …]}

An entry is pending, then running, and at last finished, stopped or failed; one that was under way when the queue itself
was stopped is interrupted, and resumed when the queue goes on. One queue at a time works on a runs folder.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from engine.commands import Stop
from engine.config import load_config
from engine.durable import write_json
from engine.errors import ExitCode, UserError
from engine.events import State
from engine.profile_files import find_profile, load_profile
from engine.store import Attempt, RunDirectory
from retention_tui import wording
from retention_tui.headless import Printer
from retention_tui.remote import RemoteClient

FORMAT = 1
PENDING, RUNNING, INTERRUPTED = "pending", "running", "interrupted"
_PROGRESS_SECONDS = 300.0
_POLL_SECONDS = 0.5


@dataclass
class Entry:
    """One profile of a queue and what became of it. Times are in seconds since the epoch."""

    profile: str
    overrides: list[str] = field(default_factory=list)
    run: str | None = None
    state: str = PENDING
    exit_code: int | None = None
    reason: str = ""
    started: float | None = None
    ended: float | None = None

    @property
    def left(self) -> bool:
        """True while there is still something to be done for it."""
        return self.state in (PENDING, RUNNING, INTERRUPTED)


@dataclass
class Record:
    """The file of a queue. `folder` is where it was given: names of files in overrides are relative to it.

    `anyway` also starts what this machine has not enough memory for.
    """

    path: Path
    folder: str
    entries: list[Entry]
    anyway: bool = False

    def save(self) -> None:
        """Raises `OSError` where it cannot be written; the file is then as it was."""
        entries = [asdict(entry) for entry in self.entries]
        head = {"format": FORMAT, "folder": self.folder, "anyway": self.anyway}
        write_json(self.path, {**head, "entries": entries})

    @classmethod
    def load(cls, path: Path) -> Record:
        """Raises `UserError` for a file that is damaged or from a newer release."""
        try:
            stored: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if stored["format"] > FORMAT:
                raise UserError(f"{path} has format {stored['format']}; this release reads up to {FORMAT}")
            entries = [Entry(**entry) for entry in stored["entries"]]
            return cls(path, stored["folder"], entries, bool(stored.get("anyway")))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} cannot be read as a queue's record: {error!r}") from None


def new_queue(
    runs_folder: Path, profiles: Sequence[str], overrides: Sequence[str] = (), anyway: bool = False
) -> Record:
    """The record of a new queue, not yet written. Raises `UserError` where one of the profiles is wrong, or, but
    `anyway`, where this machine has not enough memory for it."""
    from engine.planner import plan, refuse_what_cannot_fit  # loads MLX

    entries = []
    for profile in profiles:
        resolved, path = load_profile(profile, overrides), find_profile(profile)
        try:
            if not anyway:
                refuse_what_cannot_fit(plan(resolved))
        except UserError as error:
            raise UserError(f"{profile}: {error}") from None
        named = str(path.resolve()) if path == Path(profile) else profile
        entries.append(Entry(named, list(overrides)))
    load_config()
    stamp, number = time.strftime("queue-%Y%m%d-%H%M%S"), 1
    while (path := runs_folder / f"{stamp}{f'-{number}' if number > 1 else ''}.json").exists():
        number += 1
    return Record(path.absolute(), str(Path.cwd()), entries, anyway)


def unfinished_queue(runs_folder: Path) -> Record | None:
    """The newest queue of a folder of which something is left. Raises `UserError` where a file is damaged."""
    paths = sorted(runs_folder.glob("queue-*.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    records = (Record.load(path.absolute()) for path in paths)
    return next((record for record in records if any(entry.left for entry in record.entries)), None)


class Queue:
    """Works a record off, in the main thread. SIGINT and SIGTERM stop the present run with a checkpoint, and the queue;
    a lost terminal ends neither."""

    def __init__(self, record: Record, runs_folder: Path) -> None:
        self._record, self._runs_folder = record, runs_folder.absolute()
        self._child: subprocess.Popen[bytes] | None = None
        self._signal: int | None = None

    def work(self) -> int:
        """Runs all that is left, in order; the exit code: that of the first entry that failed. Raises `UserError`
        where another queue is at work in this folder, or the folder cannot be written."""
        try:
            self._runs_folder.mkdir(parents=True, exist_ok=True)
            lock = _lock(self._runs_folder)
            self._record.save()
        except OSError as error:
            raise UserError(f"runs folder {self._runs_folder} cannot be written: {error.strerror or error}") from None
        self._printer = Printer(Path(os.devnull))
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._stop)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        try:
            for index, entry in enumerate(self._record.entries, 1):
                if entry.left and not self._signal:
                    self._say(f"{index} of {len(self._record.entries)}: {entry.profile}")
                    self._work_on(entry)
            self._sum_up()
        finally:
            self._printer.finish()
            os.close(lock)
        if self._signal:
            return 128 + self._signal
        return next((entry.exit_code for entry in self._record.entries if entry.exit_code), ExitCode.OK)

    def _stop(self, number: int, _: object) -> None:
        self._signal = self._signal or number
        if self._child is not None:
            self._child.terminate()

    def _work_on(self, entry: Entry) -> None:
        interrupted = entry.state == INTERRUPTED
        entry.run = entry.run or self._free_name(entry)
        entry.state, entry.started = RUNNING, entry.started or time.time()
        self._save()
        run = RunDirectory(self._runs_folder / entry.run)
        if run.identity_path.exists():
            self._wait_for_another(run)
            attempt = _last_attempt(run)
            if self._signal:
                entry.state = INTERRUPTED
            elif attempt and (attempt.state == State.FINISHED or (State(attempt.state).final and not interrupted)):
                # It has ended since this queue last looked; it was a process of its own.
                entry.state, entry.reason, entry.exit_code = attempt.state, attempt.reason, _told_exit_code(run)
            else:
                self._say(f"  {entry.run} goes on where it was")
                self._train(entry, run, ["resume", entry.run])
        else:
            options = ["--name", entry.run, *(["--anyway"] if self._record.anyway else [])]
            sets = [word for override in entry.overrides for word in ("--set", override)]
            self._say(f"  training {entry.run}; to see it: retention-tui watch {run.path}")
            self._train(entry, run, ["run", entry.profile, *options, *sets])
        entry.ended = None if entry.left else time.time()
        self._save()
        self._say(f"  {_told(entry)}")

    def _train(self, entry: Entry, run: RunDirectory, arguments: list[str]) -> None:
        """Trains in a child until it has ended, and enters what it came to."""
        known = _last_attempt(run)
        command = [
            sys.executable,
            "-m",
            "retention_tui",
            *arguments,
            "--headless",
            "--runs-dir",
            str(self._runs_folder),
        ]
        with tempfile.TemporaryFile() as errors:
            try:
                # In a session of its own: neither Ctrl+C nor the loss of the terminal reaches it but through us.
                self._child = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=errors,
                    cwd=self._record.folder,
                    start_new_session=True,
                )
            except OSError as error:
                entry.state, entry.exit_code, entry.reason = State.FAILED, ExitCode.BAD_INPUT, str(error)
                return
            if self._signal:
                self._child.terminate()
            self._wait_for_child(self._child, run)
            code, self._child = self._child.returncode, None
            said = _last_line(errors)
        attempt = _last_attempt(run)
        began = attempt is not None and (known is None or attempt.id > known.id)
        entry.exit_code = 128 - code if code < 0 else code
        if code < 0:
            entry.state, entry.reason = State.FAILED, f"killed by {signal.Signals(-code).name}"
        elif attempt is not None and began and State(attempt.state).final:
            entry.state, entry.reason = attempt.state, attempt.reason
        else:
            entry.state, entry.reason = State.FAILED, said
        if self._signal and entry.state != State.FINISHED:
            entry.state, entry.exit_code = INTERRUPTED, None

    def _wait_for_child(self, child: subprocess.Popen[bytes], run: RunDirectory) -> None:
        told = time.monotonic()
        while True:
            try:
                child.wait(_POLL_SECONDS)
                return
            except subprocess.TimeoutExpired:
                if time.monotonic() - told > _PROGRESS_SECONDS:
                    told = time.monotonic()
                    self._say_progress(run)

    def _wait_for_another(self, run: RunDirectory) -> None:
        """The process that trained it may have outlived the queue that started it."""
        if run.is_live():
            self._say(f"  {run.name} is still being trained by another process; waiting for it to end")
        while run.is_live() and not self._signal:
            time.sleep(_POLL_SECONDS)
        if run.is_live() and self._signal:
            self._stop_another(run, self._signal)

    def _stop_another(self, run: RunDirectory, number: int) -> None:
        try:
            client = RemoteClient(run)
        except UserError as error:  # or it has just ended
            self._say(f"  {run.name} is not stopped: {error}")
            return
        client.send(Stop(reason=f"stopped by {signal.Signals(number).name}"))
        while run.is_live() and client.alive:
            time.sleep(_POLL_SECONDS)
        client.close()

    def _free_name(self, entry: Entry) -> str:
        """The profile's name, or the first of NAME-2, NAME-3 … that no run and no other entry has."""
        stem, number = Path(entry.profile).stem, 1
        taken = {other.run for other in self._record.entries}
        while True:
            name = stem if number == 1 else f"{stem}-{number}"
            if name not in taken and not (self._runs_folder / name).exists():
                return name
            number += 1

    def _save(self) -> None:
        """A full disk must not end the queue: the record is then behind, until it can be written again."""
        try:
            self._record.save()
        except OSError as error:
            self._say(f"{self._record.path} could not be written ({error.strerror}); the queue goes on")

    def _say_progress(self, run: RunDirectory) -> None:
        try:
            summary = run.summary()
        except UserError:
            return
        loss = wording.number(summary.loss)
        self._say(f"  {run.name}: step {summary.step:,} of {summary.total_steps:,}, loss {loss}")

    def _sum_up(self) -> None:
        states = [entry.state for entry in self._record.entries]
        counted = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
        self._say(f"the queue has {'stopped' if self._signal else 'ended'}: {counted}")
        for entry in self._record.entries:
            self._printer.print(f"  {entry.state:<11}  {entry.run or entry.profile}  {_why(entry)}".rstrip())
        if any(entry.left for entry in self._record.entries):
            self._printer.print("to go on with it: retention-tui queue --continue")

    def _say(self, text: str) -> None:
        self._printer.print(f"{time.strftime('%H:%M:%S')}  {wording.printable(text)}")


def _lock(folder: Path) -> int:
    """The right to work on a folder's queue: an flock on the folder, which ends with the process."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(
            f"another queue is at work in {folder}; stop that one first, or choose another --runs-dir"
        ) from None
    return descriptor


def _last_attempt(run: RunDirectory) -> Attempt | None:
    try:
        attempts = run.attempts()
    except UserError:  # damaged; the child says so too
        return None
    return attempts[-1] if attempts else None


def _told_exit_code(run: RunDirectory) -> int | None:
    """The exit code of a process that was not ours, as its run has recorded it."""
    try:
        ends = [event for event in run.events() if event["event"] == "run_ended"]
    except UserError:
        return None
    return ends[-1]["exit_code"] if ends else None


def _last_line(file: IO[bytes]) -> str:
    file.seek(0)
    lines = file.read().decode(errors="replace").strip().splitlines()
    return lines[-1].removeprefix("retention-tui: ") if lines else ""


def _told(entry: Entry) -> str:
    return ": ".join(part for part in (f"{entry.run} {entry.state}", _why(entry)) if part)


def _why(entry: Entry) -> str:
    code = f"exit code {entry.exit_code}" if entry.exit_code else ""
    return wording.printable(": ".join(part for part in (code, entry.reason) if part))
