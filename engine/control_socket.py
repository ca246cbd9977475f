"""Where a run's socket is, made and found safely, and a watcher's end of it."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import stat
import struct
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.commands import Command
from engine.durable import write_json
from engine.store import RunDirectory
from engine.wire import LONGEST_COMMAND_BYTES, LONGEST_EVENT_BYTES, PROTOCOL, Lines, WireError, command_to_json, parse

SOCKET_NAME = "control.sock"
LONGEST_PATH_BYTES = 103  # macOS has room for 104 with the zero at the end, Linux for 108
_FOLDER_PREFIX = "retention-tui-"
_PATIENCE_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Address:
    """Where a run is served: its socket, the process behind it, and a word that is this serving's alone."""

    path: Path
    pid: int
    serving: str


def address_path(run: RunDirectory) -> Path:
    return run.path / "control.json"


def read_address(run: RunDirectory) -> Address | None:
    """Where a run says that it is served; it may be out of date. None where it does not say so."""
    try:
        known = json.loads(address_path(run).read_bytes())
        path, pid, serving = known["path"], known["pid"], known["serving"]
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return None
    if not (isinstance(path, str) and isinstance(serving, str) and type(pid) is int and 0 < pid < 2**31):
        return None
    if path == SOCKET_NAME:  # the run may be called by another path here, or have been moved
        return Address(run.path / path, pid, serving)
    elsewhere = Path(path)
    safe = elsewhere.is_absolute() and elsewhere.name == SOCKET_NAME and "\0" not in path and _is_text(path)
    return Address(elsewhere, pid, serving) if safe else None


def write_address(run: RunDirectory, path: Path, serving: str) -> None:
    """Says where this process serves a run. Raises `OSError`."""
    where = path.name if path.parent == run.path else str(path.absolute())
    write_json(address_path(run), {"format": 1, "path": where, "pid": os.getpid(), "serving": serving})


def remove_stale_socket(run: RunDirectory) -> None:
    """Removes what a killed process has left. Only the process that holds the run's lock may."""
    if (old := read_address(run)) is not None and old.path.parent != run.path:
        with contextlib.suppress(OSError):  # nothing but what is surely ours: a run may come from a stranger
            about, folder = old.path.lstat(), old.path.parent
            ours = stat.S_ISSOCK(about.st_mode) and about.st_uid == os.geteuid()
            if ours and folder.name.startswith(_FOLDER_PREFIX):
                old.path.unlink()
                folder.rmdir()
    for name in (SOCKET_NAME, address_path(run).name):
        with contextlib.suppress(OSError):
            (run.path / name).unlink(missing_ok=True)


def bind(listener: socket.socket, path: Path) -> Path:
    """Binds in the run, or where that cannot be (a long path, a file system without sockets) in a folder of its own."""
    if len(os.fsencode(path.resolve())) <= LONGEST_PATH_BYTES:  # which is what others know it by
        with contextlib.suppress(OSError):
            listener.bind(str(path))
            return path
    folder = Path(tempfile.mkdtemp(prefix=_FOLDER_PREFIX))  # 0700
    if len(os.fsencode(folder / path.name)) > LONGEST_PATH_BYTES:
        folder.rmdir()
        folder = Path(tempfile.mkdtemp(prefix=_FOLDER_PREFIX, dir="/tmp"))
    try:
        listener.bind(str(folder / path.name))
    except OSError:
        folder.rmdir()
        raise
    return folder / path.name


def _is_text(path: str) -> bool:
    try:
        return bool(os.fsencode(path))
    except UnicodeEncodeError:  # half of a character
        return False


def peer_uid(connection: socket.socket) -> int | None:
    """The user behind a connection, where the system tells."""
    linux_option: int | None = getattr(socket, "SO_PEERCRED", None)
    with contextlib.suppress(OSError, struct.error):
        if linux_option is not None:  # struct ucred: pid, uid, gid
            return int(struct.unpack("iII", connection.getsockopt(socket.SOL_SOCKET, linux_option, 12))[1])
        if sys.platform == "darwin":  # LOCAL_PEERCRED of SOL_LOCAL: struct xucred begins with version and uid
            return int(struct.unpack_from("II", connection.getsockopt(0, 1, 76))[1])
    return None


class Connection:
    """A watcher's end: commands go out, messages come in. Made, it has been let in; `past` events come first.

    Raises `OSError` where nobody answers, and `WireError` where a watcher is refused.
    """

    def __init__(self, address: Address, looks_only: bool = False) -> None:
        about = address.path.stat()
        if not stat.S_ISSOCK(about.st_mode) or about.st_uid != os.geteuid():
            raise WireError(f"{address.path} is no socket of yours")
        self._lines = Lines(LONGEST_EVENT_BYTES)
        self._ahead: list[dict[str, Any]] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(_PATIENCE_SECONDS)
        try:
            self._socket.connect(str(address.path))
            with contextlib.suppress(BrokenPipeError):  # shown out already: why is there to be read
                self._socket.sendall(json.dumps({"hello": PROTOCOL, "looks_only": looks_only}).encode() + b"\n")
            while not self._ahead:
                self._ahead = self._receive()
            welcome, *self._ahead = self._ahead
            if "refused" in welcome:
                raise WireError(str(welcome["refused"]))
            if type(welcome.get("past")) is not int:
                raise WireError("it does not speak as a run does")
            if welcome.get("serving") != address.serving:
                raise ConnectionRefusedError("something else answers there")
        except BaseException:
            self._socket.close()
            raise
        self.pid, self.serving = address.pid, address.serving
        self.past: int = welcome["past"]
        self._socket.settimeout(None)

    def receive(self) -> list[dict[str, Any]]:
        """The next messages; waits for a first one. Raises `OSError` at the end."""
        if self._ahead:
            messages, self._ahead = self._ahead, []
            return messages
        return self._receive()

    def send(self, command: Command) -> None:
        """Sends a command; may wait. Raises `OSError` where nobody listens any more."""
        line = command_to_json(command).encode()
        if len(line) > LONGEST_COMMAND_BYTES:
            raise WireError(f"more than {LONGEST_COMMAND_BYTES:,} bytes")
        self._socket.sendall(line + b"\n")

    def close(self) -> None:
        """Ends it, also for a thread that waits in `receive`."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _receive(self) -> list[dict[str, Any]]:
        data = self._socket.recv(65536)
        if not data:
            raise ConnectionResetError("the connection was closed")
        return [parse(line) for line in self._lines.feed(data)]
