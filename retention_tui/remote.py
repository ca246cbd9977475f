"""A run that another process trains, as a screen sees it: over the run's socket, read on a thread of its own."""

from __future__ import annotations

import os
import threading
import time
from queue import SimpleQueue
from typing import Any

from engine.commands import Command, Generate
from engine.control_socket import Connection, read_address
from engine.errors import UserError
from engine.events import Alarm, AnswerEnded, Event, Notice, RunEnded, State
from engine.store import RunDirectory
from engine.wire import WireError, read_event
from engine.worker import Mailbox
from retention_tui.client import INTERRUPTED, ConnectionLost

_PATIENCE_SECONDS = 2.0
_LOOK_SECONDS = 0.05


class RemoteClient:
    """Watches a live run. See `retention_tui.client.Client`.

    Raises `UserError` where the run is not live, or cannot be watched. A connection that breaks while the run goes on
    (a watcher that was suspended for long is dropped) is made again.
    """

    here = False

    def __init__(self, run: RunDirectory, *, looks_only: bool = False) -> None:
        self.run, self.looks_only = run, looks_only
        self.ended: RunEnded | None = None
        self.lost: ConnectionLost | None = None
        self.arrived = threading.Event()
        """Set once all has been received that tells where the run stands."""
        self._closed = False
        self._mailbox = Mailbox()
        self._outbox: SimpleQueue[Command | None] = SimpleQueue()
        self._newest = 0.0  # the time of the newest event
        self._connection = connect(run, looks_only)
        self._past = self._connection.past
        if not self._past:
            self.arrived.set()
        for name, work in (("reader", self._read), ("writer", self._write)):
            threading.Thread(target=work, name=f"{name} of {run.name}", daemon=True).start()

    @property
    def pid(self) -> int:
        """The process that trains."""
        return self._connection.pid

    @property
    def alive(self) -> bool:
        return self.ended is None and self.lost is None

    def send(self, command: Command) -> None:
        self._outbox.put(command)

    def events(self, timeout_seconds: float = 0.0) -> list[Event]:
        return self._mailbox.take(timeout_seconds)

    def close(self) -> None:
        self._closed = True
        self._outbox.put(None)
        self._connection.close()

    # The threads

    def _read(self) -> None:
        while self.alive and not self._closed:
            try:
                for message in self._connection.receive():
                    self._take(message)
            except (OSError, WireError) as error:
                if self.alive and not self._closed:
                    self._connect_again(error)
        self.close()

    def _take(self, message: dict[str, Any]) -> None:
        if "refused" in message:
            self._mailbox.put(Alarm(level="warning", text=f"refused: {message['refused']}"))
            return
        past, self._past = self._past > 0, max(0, self._past - 1)
        try:
            event = read_event(message)
        except WireError as error:  # the releases differ
            event = Notice(text=f"not understood: {error}")
        if not (past and event.time <= self._newest):  # else told again after the connection was made again
            self._newest = max(self._newest, event.time)
            self._mailbox.put(event)
        if not self._past:
            self.arrived.set()
        if isinstance(event, RunEnded):
            self.ended = event

    def _connect_again(self, error: Exception) -> None:
        """Goes on with the same process, or says that nothing more will come."""
        pid, words = self._connection.pid, str(error)
        self._connection.close()
        try:
            connection = connect(self.run, self.looks_only)
        except UserError as failure:
            words = str(failure)
        else:
            if connection.pid == pid and not self._closed:
                self._connection, self._past = connection, connection.past
                return
            connection.close()
        name = self.run.name
        if _is_running(self.run, pid):
            lost = ConnectionLost(text=f"the connection to {name} broke: {words}", word="not connected")
        else:
            text = f"{name} was interrupted: process {pid} is gone; retention-tui resume {name} goes on with it"
            lost = ConnectionLost(text=text, word=INTERRUPTED)
        self._mailbox.put(lost)
        self.lost = lost

    def _write(self) -> None:
        while (command := self._outbox.get()) is not None:
            try:
                self._connection.send(command)
            except WireError as error:
                self._mailbox.put(Alarm(level="warning", text=f"not sent: {error}"))
                if isinstance(command, Generate):
                    reason = f"failed: {error}"
                    self._mailbox.put(AnswerEnded(answer=command.answer, reason=reason, tokens=0, seconds=0.0))
            except OSError:
                pass  # the reader says so


def connect(run: RunDirectory, looks_only: bool = False) -> Connection:
    """Finds a live run's socket and is let in. Raises `UserError` in one line."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        problem = "its process serves no socket"
        address = read_address(run)
        try:
            if address is not None:
                return Connection(address, looks_only)
        except TimeoutError:
            raise UserError(f"run {run.name} does not answer: process {address.pid if address else 0} hangs") from None
        except OSError as error:
            problem = error.strerror or str(error)
        except WireError as error:
            raise UserError(f"run {run.name} refuses to be watched: {error}") from None
        if not run.is_live():
            raise not_live(run)
        if time.monotonic() > deadline:  # one that has just begun, or is about to end, is given a moment
            raise (
                not_live(run)
                if _has_ended(run)
                else UserError(f"run {run.name} is live, but cannot be watched: {problem}; see {run.log_path}")
            )
        time.sleep(_LOOK_SECONDS)


def not_live(run: RunDirectory) -> UserError:
    """One line: how the run stands, and what can be done with it."""
    summary = run.summary()
    where = f"it {_PAST.get(summary.state, summary.state)} at step {summary.step:,}"
    if summary.state == State.FINISHED:
        return UserError(f"run {run.name} is not live: {where}; retention-tui show {run.name} tells of it")
    return UserError(f"run {run.name} is not live: {where}; retention-tui resume {run.name} goes on with it")


_PAST = {"interrupted": "was interrupted", "stopped": "was stopped"}


def _has_ended(run: RunDirectory) -> bool:
    """Whether its last attempt has ended, though a screen may still show it and hold its lock."""
    attempts = run.attempts()
    return bool(attempts) and State(attempts[-1].state).final


def _is_running(run: RunDirectory, pid: int) -> bool:
    """Whether a process that served a run still trains it."""
    address = read_address(run)
    if not run.is_live() or address is None or address.pid != pid:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True
