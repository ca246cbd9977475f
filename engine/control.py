"""A run's Unix socket: the user who trains a run may watch it from other processes, and steer it.

    RUN/control.sock     the socket, 0600; where that path is too long, in a temporary folder of its own, 0700
    RUN/control.json     where it is and whose: "control.sock" for the run's own, else an absolute path; a file of its
                         own, as it comes and goes while run.json stays

Lines of JSON go both ways (`engine.wire`). A watcher begins with

    {"hello": 1, "looks_only": false}

and is answered with {"welcome": 1, "run": …, "serving": …, "past": N}, where `serving` is control.json's, then N events
that tell where the run stands, then every event as it happens. Each has a `number` of its own (pieces of answers have
none), so that who connects again knows what is news. What a watcher sends are commands. A line that is not understood,
or is more than looking where only that was asked for, is answered with {"refused": "why"}, with the `answer` that was
asked for if any, and logged. History comes from the store, as for any screen.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from engine.commands import CancelGeneration, Command, Generate
from engine.control_socket import SOCKET_NAME, address_path, bind, peer_uid, remove_stale_socket, write_address
from engine.events import Event, RunEnded
from engine.store import RunDirectory
from engine.watchers import Present, Watcher
from engine.wire import LONGEST_COMMAND_BYTES, PROTOCOL, WireError, event_to_line, parse, read_command
from engine.worker import Mailbox

WATCHERS = 32
_ROUND_SECONDS = 0.1  # events are passed on in rounds: the engine wakes nobody, and one look serves many steps
_IDLE_SECONDS = 1.0
_PATIENCE_SECONDS = 2.0  # with slow readers, once the run has ended
_REFUSALS = 100


class ControlServer:
    """Serves one run, on a thread of its own, until the run has ended or `close` is called.

    It only reads a mailbox and hands on commands, so the engine never waits for it. A run that cannot be served is
    trained all the same; its log says why.
    """

    def __init__(self, run: RunDirectory, mailbox: Mailbox, send: Callable[[Command], None]) -> None:
        self._run, self._mailbox, self._send = run, mailbox, send
        self._present = Present()
        self._watchers: set[Watcher] = set()
        self._log = _Log(run.log_path)
        self._selector = selectors.DefaultSelector()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._path: Path | None = None
        self._serving = uuid.uuid4().hex
        self._waker, self._wakened = socket.socketpair()
        self._wakened.setblocking(False)
        self._over = False
        self._thread = threading.Thread(target=self._work, name=f"control of {run.name}", daemon=True)

    def start(self) -> None:
        """Begins to serve. Only the process that holds the run's lock may."""
        remove_stale_socket(self._run)
        try:
            self._listen()
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or error
            self._log.write(f"this run cannot be watched from elsewhere: {reason}")
            self._remove()
        else:
            self._thread.start()

    def close(self) -> None:
        """Says what is still to be said, and ends; the socket is gone afterwards. May be called more than once."""
        self._over = True
        with contextlib.suppress(OSError):
            self._waker.send(b"x")
        if self._thread.ident is not None:
            self._thread.join(2 * _PATIENCE_SECONDS)
        else:  # it has never begun
            self._remove()
        self._waker.close()

    # The socket

    def _listen(self) -> None:
        self._listener.setblocking(False)
        self._path = bind(self._listener, self._run.path / SOCKET_NAME)
        self._path.chmod(0o600)  # nobody can have connected: it does not listen yet
        self._listener.listen(WATCHERS)
        write_address(self._run, self._path, self._serving)
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._wakened, selectors.EVENT_READ)

    def _remove(self) -> None:
        for watcher in tuple(self._watchers):
            self._drop(watcher)
        for part in (self._listener, self._selector, self._wakened):
            part.close()
        with contextlib.suppress(OSError):
            address_path(self._run).unlink(missing_ok=True)
        if self._path is not None:
            with contextlib.suppress(OSError):
                self._path.unlink(missing_ok=True)
                if self._path.parent != self._run.path:
                    self._path.parent.rmdir()

    # The thread

    def _work(self) -> None:
        try:
            while not self._over:
                self._serve(_ROUND_SECONDS if self._watchers else _IDLE_SECONDS)
            self._publish(self._mailbox.take())
            self._finish()
        except Exception:  # a defect of ours ends the watching, not the run
            self._log.write(f"this run is not served any more: {traceback.format_exc()}")
        finally:
            self._remove()
            self._log.close()

    def _serve(self, timeout_seconds: float) -> None:
        for key, ready in self._selector.select(timeout_seconds):
            if key.fileobj is self._listener:
                self._accept()
            elif isinstance(key.data, Watcher):
                if ready & selectors.EVENT_READ:
                    self._hear(key.data)
                if ready & selectors.EVENT_WRITE:
                    self._flush(key.data)
        self._publish(self._mailbox.take())
        now = time.monotonic()
        for watcher in tuple(self._watchers):
            if reason := watcher.reason_to_leave(now):
                self._drop(watcher, reason)

    def _publish(self, events: Iterable[Event]) -> None:
        for event in events:
            number = self._present.take(event)
            self._over = self._over or isinstance(event, RunEnded)
            if self._watchers:
                line = event_to_line(event, number)
                for watcher in self._watchers:
                    watcher.put(event, line)
        for watcher in tuple(self._watchers):
            self._flush(watcher)

    def _finish(self) -> None:
        """Gives everybody a last chance to read the end."""
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while any(watcher.waiting for watcher in self._watchers) and time.monotonic() < deadline:
            for key, ready in self._selector.select(_ROUND_SECONDS):
                if isinstance(key.data, Watcher):
                    if ready & selectors.EVENT_WRITE:
                        self._flush(key.data)
                    elif not _drain(key.data.socket):
                        self._drop(key.data)
                else:
                    self._selector.unregister(key.fileobj)

    # Watchers

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError as error:
            self._log.write(f"a watcher could not be let in: {error.strerror or error}")
            time.sleep(_ROUND_SECONDS)  # out of descriptors: it would be tried again at once
            return
        connection.setblocking(False)
        watcher = Watcher(connection)
        self._selector.register(connection, selectors.EVENT_READ, watcher)
        self._watchers.add(watcher)
        uid = peer_uid(connection)
        if uid is not None and uid != os.geteuid():
            self._refuse(watcher, f"a process of another user ({uid})", leave=True)
        elif len(self._watchers) > WATCHERS:
            self._refuse(watcher, f"more than {WATCHERS} watchers", leave=True)

    def _hear(self, watcher: Watcher) -> None:
        try:
            data = watcher.socket.recv(LONGEST_COMMAND_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._drop(watcher)
            return
        try:
            lines = watcher.lines.feed(data)
        except WireError as error:
            self._refuse(watcher, str(error), leave=True)  # where the next line begins is not known
            return
        for line in lines:
            if watcher not in self._watchers:
                return
            message: dict[str, Any] = {}
            try:
                message = parse(line)
                self._obey(watcher, message)
            except WireError as error:
                watcher.refusals += 1
                leave = not watcher.welcome or watcher.refusals >= _REFUSALS
                self._refuse(watcher, str(error), leave, message.get("answer"))

    def _obey(self, watcher: Watcher, message: dict[str, Any]) -> None:
        if not watcher.welcome:
            watcher.looks_only = _read_hello(message)
            self._publish(self._mailbox.take())  # so that nothing is told twice
            self._welcome(watcher)
            return
        command = read_command(message)
        if watcher.looks_only:
            raise WireError(f"{message['command']}: this watcher may only look")
        if isinstance(command, Generate):
            watcher.answers.add(command.answer)
        self._send(command)

    def _welcome(self, watcher: Watcher) -> None:
        past = self._present.events()
        about = {"welcome": PROTOCOL, "run": self._run.name, "serving": self._serving, "past": len(past)}
        watcher.welcome = True
        watcher.say(about)
        for number, event in past:
            watcher.put(event, event_to_line(event, number))
        self._flush(watcher)

    def _refuse(self, watcher: Watcher, reason: str, leave: bool = False, answer: object = None) -> None:
        self._log.write(f"refused: {reason}")
        watcher.say({"refused": reason, **({"answer": answer} if isinstance(answer, str) else {})})
        self._flush(watcher)
        if leave:
            self._drop(watcher)

    def _flush(self, watcher: Watcher) -> None:
        try:
            watcher.flush()
        except OSError:
            self._drop(watcher)
            return
        if watcher in self._watchers:
            wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if watcher.waiting else 0)
            if self._selector.get_key(watcher.socket).events != wanted:
                self._selector.modify(watcher.socket, wanted, watcher)

    def _drop(self, watcher: Watcher, reason: str = "") -> None:
        """Lets a watcher go; nobody is left to hear its answers."""
        if watcher not in self._watchers:
            return
        self._watchers.remove(watcher)
        self._selector.unregister(watcher.socket)
        watcher.socket.close()
        for answer in watcher.answers:
            self._send(CancelGeneration(answer=answer))
        if reason:
            self._log.write(f"a watcher was dropped: {reason}")


class _Log:
    """Adds lines to the run's log, one a second at most, so that no stranger can fill the disk with refusals."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._written = -1.0
        self._unsaid = 0

    def write(self, text: str) -> None:
        if time.monotonic() - self._written < 1.0:
            self._unsaid += 1
            return
        self._written = time.monotonic()
        more = f" (and {self._unsaid} more of the kind before)" if self._unsaid else ""
        self._unsaid = 0
        clock = time.strftime("%Y-%m-%d %H:%M:%S")
        with contextlib.suppress(OSError), self._path.open("a", encoding="utf-8") as log:
            log.write(f"{clock}  control: {text}{more}\n")

    def close(self) -> None:
        if self._unsaid:
            self._written = -1.0
            self._unsaid, unsaid = 0, self._unsaid
            self.write(f"{unsaid} more of the kind before")


def _read_hello(message: dict[str, Any]) -> bool:
    """Whether a watcher wants to look only. Raises `WireError`."""
    version, looks_only = message.get("hello"), message.get("looks_only", False)
    if set(message) - {"hello", "looks_only"} or type(version) is not int or type(looks_only) is not bool:
        raise WireError(f'the first line must be {{"hello": {PROTOCOL}, "looks_only": false}}')
    if version != PROTOCOL:
        raise WireError(f"this run speaks protocol {PROTOCOL}, not {version}: watch it with the release that trains it")
    return looks_only


def _drain(connection: socket.socket) -> bool:
    """Reads what nobody will answer any more; false once the other side is gone."""
    try:
        return bool(connection.recv(LONGEST_COMMAND_BYTES))
    except BlockingIOError:
        return True
    except OSError:
        return False
