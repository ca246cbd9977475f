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
from engine.events import Alarm, AnswerEnded, Event, Notice, RunEnded, RunOpened, State, StateChanged
from engine.report import INTERRUPTED
from engine.store import RunDirectory
from engine.wire import WireError, read_event, read_number
from engine.worker import Mailbox
from retention_tui.client import ConnectionLost, Reconnected

_PATIENCE_SECONDS = 2.0
_LOOK_SECONDS = 0.05
_SHORTEST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.1, 5.0
_CONNECTION_LOST = "connection lost"


class RemoteClient:
    """Watches a live run. See `retention_tui.client.Client`.

    Raises `UserError` where the run is not live, or cannot be watched. A connection that breaks while the run goes on
    (a watcher that was suspended for long is dropped) is made again. A command that did not get through then does, or
    it is said that it has not; an answer that was coming in ends.
    """

    here = False

    def __init__(self, run: RunDirectory, *, looks_only: bool = False) -> None:
        self.run, self.looks_only = run, looks_only
        self.ended: RunEnded | None = None
        self.lost: ConnectionLost | None = None
        self.arrived = threading.Event()
        """Set once all has been received that tells where the run stands."""
        self._closing = threading.Event()
        self._mailbox = Mailbox()
        self._outbox: SimpleQueue[Command | None] = SimpleQueue()
        self._newest = 0  # the number of the newest event
        self._attempt: int | None = None
        self._state = State.LOADING
        self._answers: dict[str, bool] = {}  # those that were asked for and have not ended
        self._held: list[Event] | None = None  # news of a connection that was made again, until all of it is there
        self._connection = connect(run, looks_only)
        self._changed = threading.Condition()  # another connection, or the end of them
        self._since, self._pause_seconds = time.monotonic(), _SHORTEST_PAUSE_SECONDS
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
        with self._changed:
            self._closing.set()
            self._changed.notify_all()
        self._outbox.put(None)
        self._connection.close()

    # The reader

    def _read(self) -> None:
        while self.alive and not self._closing.is_set():
            try:
                for message in self._connection.receive():
                    self._take(message)
            except (OSError, WireError) as error:
                if self.alive and not self._closing.is_set():
                    self._connect_again(error)
        self.close()

    def _take(self, message: dict[str, Any]) -> None:
        if "refused" in message:
            reason = f"refused: {message['refused']}"
            self._mailbox.put(Alarm(level="warning", text=reason))
            self._end_answer(message.get("answer"), reason)
            return
        try:
            event = read_event(message)
        except WireError as error:  # the releases differ
            event = Notice(text=f"not understood: {error}")
        match event:
            case StateChanged():
                self._state = event.state
            case RunOpened():
                self._attempt = event.attempt
            case AnswerEnded():
                self._answers.pop(event.answer, None)
        number = read_number(message)
        if number is None or number > self._newest:  # else told again after the connection was made again
            self._newest = number or self._newest
            self._put(event)
        self._past = max(0, self._past - 1)
        if not self._past:
            self._arrive()

    def _put(self, event: Event) -> None:
        if self._held is not None:
            self._held.append(event)
            return
        self._mailbox.put(event)
        if isinstance(event, RunEnded):
            self.ended = event

    def _arrive(self) -> None:
        self.arrived.set()
        if self._held is not None:
            held, self._held = self._held, None
            self._mailbox.put(Reconnected(state=self._state))
            for event in held:
                self._put(event)

    def _connect_again(self, error: Exception) -> None:
        """Goes on with the same process, or says that nothing more will come."""
        self._connection.close()
        for answer in tuple(self._answers):
            self._end_answer(answer, _CONNECTION_LOST)
        self._pause()
        old, words = self._connection, str(error)
        try:
            connection = connect(self.run, self.looks_only)
        except UserError as failure:
            self._give_up(_how_it_ended(self.run, self._attempt) or self._loss(f"{words}; {failure}"))
            return
        if connection.serving != old.serving:
            connection.close()
            words = f"{self.run.name} is trained by process {connection.pid} now: retention-tui watch {self.run.name}"
            lost = ConnectionLost(text=words, word="not connected")
            self._give_up(_how_it_ended(self.run, self._attempt) or lost)
            return
        self._since = time.monotonic()
        self._past, self._held = connection.past, []
        with self._changed:
            self._connection = connection
            self._changed.notify_all()
            if self._closing.is_set():
                connection.close()

    def _pause(self) -> None:
        """Waits a little before another try, and longer where the last one did not help for long."""
        if time.monotonic() - self._since > 2 * _LONGEST_PAUSE_SECONDS:
            self._pause_seconds = _SHORTEST_PAUSE_SECONDS
        self._closing.wait(self._pause_seconds)
        self._pause_seconds = min(2 * self._pause_seconds, _LONGEST_PAUSE_SECONDS)

    def _loss(self, words: str) -> ConnectionLost:
        name, pid = self.run.name, self._connection.pid
        if self.run.is_live() and _exists(pid):
            return ConnectionLost(text=f"the connection to {name} broke: {words}", word="not connected")
        text = f"{name} was interrupted: process {pid} is gone; retention-tui resume {name} goes on with it"
        return ConnectionLost(text=text, word=INTERRUPTED)

    def _give_up(self, event: RunEnded | ConnectionLost) -> None:
        self._mailbox.put(event)
        if isinstance(event, RunEnded):
            self.ended = event
        else:
            self.lost = event

    # The writer

    def _write(self) -> None:
        while (command := self._outbox.get()) is not None:
            connection: Connection | None = self._connection
            while connection is not None:
                try:
                    if isinstance(command, Generate):
                        self._answers[command.answer] = True
                    connection.send(command)
                    break
                except WireError as error:
                    self._say_unsent(command, str(error))
                    break
                except OSError:
                    if isinstance(command, Generate):  # it would be answered late; it can be asked again
                        self._end_answer(command.answer, _CONNECTION_LOST)
                        break
                    connection = self._next_connection(connection)
            else:
                self._say_unsent(command, _CONNECTION_LOST)

    def _next_connection(self, old: Connection) -> Connection | None:
        """Waits for it; none where there will be none."""
        with self._changed:
            self._changed.wait_for(lambda: self._connection is not old or self._closing.is_set())
            return None if self._connection is old else self._connection

    def _say_unsent(self, command: Command, reason: str) -> None:
        if self.ended is None:
            self._mailbox.put(Alarm(level="warning", text=f"not sent: {reason}"))
        if isinstance(command, Generate):
            self._end_answer(command.answer, f"failed: {reason}")

    def _end_answer(self, answer: object, reason: str) -> None:
        """Ends an answer of which nothing more will come, once."""
        if isinstance(answer, str) and self._answers.pop(answer, False):
            self._mailbox.put(AnswerEnded(answer=answer, reason=reason, tokens=0, seconds=0.0))


class EndedClient:
    """A run of another process that has ended before it could be watched. See `retention_tui.client.Client`."""

    here = looks_only = alive = False

    def __init__(self, run: RunDirectory, ended: RunEnded) -> None:
        self.run = run
        self._events: list[Event] = [Reconnected(state=ended.state), ended]

    def send(self, command: Command) -> None:
        """Nobody is left to hear it."""

    def events(self, timeout_seconds: float = 0.0) -> list[Event]:
        events, self._events = self._events, []
        return events

    def close(self) -> None:
        """There is nothing to close."""


def watch_or_recall(run: RunDirectory) -> RemoteClient | EndedClient:
    """Watches a run that has just been started, also where it has ended since. Raises `UserError`."""
    try:
        return RemoteClient(run)
    except UserError:
        attempts = run.attempts()
        ended = _how_it_ended(run, attempts[-1].id) if attempts and not run.is_live() else None
        if ended is None:
            raise
        return EndedClient(run, ended)


def connect(run: RunDirectory, looks_only: bool = False) -> Connection:
    """Finds a live run's socket and is let in. Raises `UserError` in one line."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        problem = "its process serves no socket"
        if not run.is_live():
            raise not_live(run)
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


def _how_it_ended(run: RunDirectory, attempt: int | None) -> RunEnded | None:
    """What the process that trained an attempt has said at its end, if it has; None where it had not opened the run."""
    ended, within = None, False
    try:
        for stored in run.events():
            if stored["event"] == RunOpened.kind and stored.get("attempt") == attempt:
                ended, within = None, True
            elif stored["event"] == StateChanged.kind and stored.get("state") == State.LOADING and attempt is None:
                ended, within = None, True  # the newest process
            elif stored["event"] == RunEnded.kind and within and ended is None:
                event = read_event(stored)
                ended = event if isinstance(event, RunEnded) else None
    except (UserError, WireError):  # a damaged store, or one of another release
        return None
    return ended


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True
