"""Profiles that are trained one after the other, each in a fresh process of its own.

One queue at a time works on a runs folder.
"""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import IO

from engine.commands import Stop
from engine.errors import ExitCode, UserError
from engine.events import State
from engine.report import INTERRUPTED
from engine.store import Attempt, RunDirectory
from retention_tui import wording
from retention_tui.fresh import fresh_process
from retention_tui.headless import Printer
from retention_tui.queue_record import RUNNING, Entry, Record
from retention_tui.remote import RemoteClient

_PROGRESS_SECONDS = 300.0
_POLL_SECONDS = 0.5


class Queue:
    """Works a record off, in the main thread. SIGINT and SIGTERM stop the present run with a checkpoint, and the queue;
    a second SIGINT gives up a run that does not stop. A lost terminal ends neither."""

    def __init__(self, record: Record, runs_folder: Path) -> None:
        self._record, self._runs_folder = record, runs_folder.absolute()
        self._child: subprocess.Popen[bytes] | None = None
        self._signal: int | None = None
        self._given_up = False

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
        self._given_up = self._given_up or (self._signal is not None and number == signal.SIGINT)
        self._signal = self._signal or number
        if self._child is not None and self._given_up:
            self._child.kill()
        elif self._child is not None:
            self._child.terminate()

    def _work_on(self, entry: Entry) -> None:
        interrupted = entry.state == INTERRUPTED
        entry.run = entry.run or self._free_name(entry)
        entry.state, entry.started = RUNNING, entry.started or time.time()
        self._save()
        run = RunDirectory(self._runs_folder / entry.run)
        if run.identity_path.exists():
            self._wait_for_another(run, interrupted)
            if self._signal:
                entry.state = INTERRUPTED
            elif attempt := _done(run, interrupted):
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
        command = fresh_process([*arguments, "--headless", "--runs-dir", str(self._runs_folder)])
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
        told, stopping = time.monotonic(), False
        while True:
            try:
                child.wait(_POLL_SECONDS)
                return
            except subprocess.TimeoutExpired:
                if self._signal and not stopping:
                    stopping = True
                    self._say(f"  {run.name} is stopped with a checkpoint; Ctrl+C once more gives it up as it is")
                if time.monotonic() - told > _PROGRESS_SECONDS:
                    told = time.monotonic()
                    self._say_progress(run)

    def _wait_for_another(self, run: RunDirectory, interrupted: bool) -> None:
        """The process that trained it may have outlived the queue that started it; or an app has the run on its
        screen, which is waited for only where the run is to go on."""
        told = False
        while run.is_live() and not _done(run, interrupted) and not self._signal:
            if not told:
                self._say(f"  {run.name} is still with another process; waiting for that to end")
            told = True
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
        while run.is_live() and client.alive and not self._given_up:
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


def _done(run: RunDirectory, interrupted: bool) -> Attempt | None:
    """The attempt with which a run has ended; none where it is to go on: also after a stop, if that was the queue's."""
    attempt = _last_attempt(run)
    if attempt and (attempt.state == State.FINISHED or (State(attempt.state).final and not interrupted)):
        return attempt
    return None


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
