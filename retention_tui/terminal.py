"""Takes the terminal for the app, gives it back, and survives its loss.

While the app shows itself, nobody else has the terminal: descriptors 0, 1 and 2 lead to nothing and to the run's log,
so libraries that print or draw bars write there. A terminal that vanishes shows itself as end of file, as an error or
as SIGHUP, in any order and not always as a signal; each leads to `Terminal.lose`, and the app leaves.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import sys
import tempfile
import termios
import threading
import time
from codecs import getincrementaldecoder
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import IO, Any, ClassVar, Self, cast

from textual import events
from textual._xterm_parser import XTermParser
from textual.app import App
from textual.drivers.linux_driver import LinuxDriver

_HANGUP_SECONDS = 0.5  # between a SIGHUP and the loss that it tells of
_PATIENCE_SECONDS = 2.0  # with a terminal that takes nothing more, once the app should leave
_STREAMS = (0, 1, 2)


class Terminal:
    """The process's terminal while the app has it: a context manager, entered on the main thread.

    `lost` is true once it has vanished; then it is not given back, and what is printed goes on to the log.
    """

    def __init__(self) -> None:
        self.lost = False
        self._leaving_since: float | None = None
        self._leave: Callable[[], object] | None = None
        self._given_back = False

    def __enter__(self) -> Self:
        _flush()
        self._attributes: list[Any] | None = None
        with suppress(termios.error):  # lost already; the driver will notice
            self._attributes = termios.tcgetattr(0)
        self._fd = _open_terminal()
        self._kept = [os.dup(number) for number in _STREAMS]
        self._printed: IO[bytes] = tempfile.TemporaryFile()  # until there is a run with a log
        with Path(os.devnull).open("rb") as nothing:
            os.dup2(nothing.fileno(), 0)
        _redirect_output(self._printed.fileno())
        return self

    def __exit__(self, *_: object) -> None:
        self._given_back = True
        _flush()
        for taken in (signal.SIGTSTP, signal.SIGCONT, signal.SIGWINCH):  # by the driver
            signal.signal(taken, signal.SIG_DFL)
        if self._attributes is not None:
            with suppress(termios.error):
                termios.tcsetattr(self._fd, termios.TCSANOW, self._attributes)
        for number, kept in zip(_STREAMS, self._kept, strict=True):
            if not self.lost:
                os.dup2(kept, number)
            os.close(kept)
        os.close(self._fd)

    @property
    def driver_class(self) -> type[LinuxDriver]:
        """The driver that shows an app on this terminal."""
        return type("TerminalDriver", (_Driver,), {"terminal": self})

    @property
    def size(self) -> tuple[int, int]:
        """Columns and lines; 80×24 where it says nothing."""
        try:
            columns, lines = os.get_terminal_size(self._fd)
        except OSError:
            return 80, 24
        return (columns, lines) if columns and lines else (80, 24)

    def log_to(self, path: Path) -> None:
        """From now on, whatever the process prints is added to this file."""
        with path.open("ab") as log:
            _redirect_output(log.fileno())

    def printed(self) -> str:
        """What was printed before there was a log."""
        self._printed.seek(0)
        return self._printed.read().decode(errors="replace")

    @property
    def leaving(self) -> bool:
        """True once the app was asked to leave."""
        return self._leaving_since is not None

    # Leaving: from any thread, from signal handlers, as often as one likes

    def leave(self) -> None:
        """Asks the app to exit with the result `detach`, now or as soon as it shows itself."""
        if self._given_back:
            return
        self._leaving_since = self._leaving_since or time.monotonic()
        if self._leave is not None:
            with suppress(RuntimeError):  # the app has ended meanwhile
                self._leave()

    def lose(self) -> None:
        """The terminal is gone."""
        self.lost = True
        self.leave()

    def hang_up(self) -> None:
        """SIGHUP: the terminal goes, or someone sent it by hand and the terminal stays; both end the app."""
        if self._given_back:
            return
        if is_lost(self._fd):
            self.lose()
        else:
            later = threading.Timer(_HANGUP_SECONDS, self._decide)
            later.daemon = True
            later.start()

    def _decide(self) -> None:
        if not self._given_back and is_lost(self._fd):
            self.lost = True
        self.leave()

    # For the driver

    def shown(self, leave: Callable[[], object]) -> None:
        """The app shows itself; `leave` makes it exit."""
        self._leave = leave
        if self.leaving:
            leave()

    def fileno(self) -> int:
        return self._fd

    def read(self, timeout_seconds: float) -> bytes:
        """What was typed; empty if nothing was, or if the terminal is lost."""
        try:
            if not select.select([self._fd], [], [], timeout_seconds)[0]:
                return b""
            data = os.read(self._fd, 4096)
        except BlockingIOError:  # another process was faster
            return b""
        except OSError:
            data = b""
        if not data:
            self.lose()
        return data

    def write(self, text: str) -> None:
        """Shows text. Never raises: from a lost terminal it returns at once, and from one that takes nothing (a frozen
        connection) as soon as the app should leave."""
        data = text.encode(errors="replace")
        while data and not self.lost:
            try:
                if select.select([], [self._fd], [], 0.1)[1]:
                    data = data[os.write(self._fd, data) :]
                elif self._leaving_since and time.monotonic() > self._leaving_since + _PATIENCE_SECONDS:
                    self.lose()
            except BlockingIOError:
                time.sleep(0.01)
            except OSError:
                self.lose()

    def flush(self) -> None:
        """Nothing waits here."""


class _Driver(LinuxDriver):
    """Textual's own, on a terminal that may vanish at any moment."""

    terminal: ClassVar[Terminal]

    def __init__(
        self, app: App[Any], *, debug: bool = False, mouse: bool = True, size: tuple[int, int] | None = None
    ) -> None:
        super().__init__(app, debug=debug, mouse=mouse, size=size or self.terminal.size)
        self.fileno = self.terminal.fileno()
        self.input_tty = True
        self._file = cast(Any, self.terminal)

    def start_application_mode(self) -> None:
        super().start_application_mode()
        if self._writer_thread is None:
            self.terminal.lose()
        self._app.begin_capture_print(cast(Any, self))
        self.terminal.shown(partial(self._loop.call_soon_threadsafe, self._exit))

    def _exit(self, patience_seconds: float = 2.0) -> None:
        """Ends the app, but not while a screen is being made, whose parts would then miss each other."""
        if patience_seconds > 0 and not (self._app.screen_stack and self._app.screen.is_mounted):
            self._loop.call_later(0.05, self._exit, patience_seconds - 0.05)
        else:
            self._app.exit("detach")

    def post_message(self, message: events.Print) -> bool:
        """Takes what Python code prints while the app runs: Textual would drop it."""
        assert sys.__stderr__ is not None
        with suppress(OSError):
            sys.__stderr__.write(message.text)
            sys.__stderr__.flush()
        return True

    def write(self, data: str) -> None:
        if not self.terminal.lost:
            super().write(data)

    def run_input_thread(self) -> None:
        """As Textual's, but it ends where the terminal does, and takes bytes that are no UTF-8."""
        parser = XTermParser(self._debug)
        decode = getincrementaldecoder("utf-8")(errors="replace").decode
        while not self.exit_event.is_set() and not self.terminal.lost:
            if text := decode(self.terminal.read(0.1)):
                for event in parser.feed(text):
                    self.process_message(event)
            for event in parser.tick():
                self.process_message(event)

    def _get_terminal_size(self) -> tuple[int, int]:
        return self.terminal.size


def is_lost(fd: int) -> bool:
    """True where the descriptor is of a terminal that has vanished."""
    try:
        termios.tcgetattr(fd)
    except termios.error as error:
        return bool(error.args[0] == errno.EIO)
    return False


def _open_terminal() -> int:
    """The terminal once more, so that writing to it can be made to never block without touching the shell's own."""
    try:
        return os.open(os.ttyname(0), os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
    except OSError:  # another user's (su), or one without a name here (a container)
        return os.dup(0)


def _redirect_output(fd: int) -> None:
    _flush()
    os.dup2(fd, 1)
    os.dup2(fd, 2)


def _flush() -> None:
    for stream in (sys.__stdout__, sys.__stderr__):
        if stream is not None:
            with suppress(OSError, ValueError):
                stream.flush()
