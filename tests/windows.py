"""A terminal window of one's own: a command in a real pseudo-terminal, which can be typed into, resized and closed."""

from __future__ import annotations

import fcntl
import os
import re
import select
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

COMMAND = [sys.executable, "-m", "retention_tui"]
ENTER_SCREEN, LEAVE_SCREEN = b"\x1b[?1049h", b"\x1b[?1049l"
# Makes the pseudo-terminal the controlling one of its session, so that its loss is signalled.
TAKE_TERMINAL = (
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
)


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"still no {what} after {seconds} s"
        time.sleep(0.02)


class Window:
    """A terminal window with a command in it."""

    def __init__(self, *command: str, **environment: str) -> None:
        self.master, self._slave = os.openpty()
        self.resize(80, 24)
        self.modes = termios.tcgetattr(self._slave)
        self.output = bytearray()
        self._reading = True
        variables = {**os.environ, "TERM": "xterm-256color", **environment}
        self.process = subprocess.Popen(
            [sys.executable, "-c", TAKE_TERMINAL, *command],
            stdin=self._slave,
            stdout=self._slave,
            stderr=self._slave,
            start_new_session=True,
            env={name: value for name, value in variables.items() if name not in ("LINES", "COLUMNS")},
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        while self._reading:
            if select.select([self.master], [], [], 0.05)[0]:
                self.output += os.read(self.master, 65536)

    def resize(self, columns: int, lines: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def type(self, keys: bytes) -> None:
        os.write(self.master, keys)

    def freeze(self) -> None:
        """From now on nobody reads what is written to the terminal."""
        self._reading = False
        self._reader.join()

    def close(self) -> None:
        """The window is gone, and the terminal with it."""
        self.freeze()
        with suppress(OSError):
            os.close(self._slave)
            os.close(self.master)

    def exit_code(self, seconds: float = 30) -> int:
        code = self.process.wait(seconds)
        time.sleep(0.1)  # the reader's
        return code

    def shows(self, text: bytes, since: int = 0) -> bool:
        """Whether the text was written, whatever colours and moves of the cursor lie between its words."""
        plain = re.sub(rb"\x1b\[[0-9;?]*[A-Za-z]", b"", bytes(self.output[since:]))
        return text in plain

    def lowest_line(self, since: int) -> int:
        """The lowest line to which the cursor was moved, from 1."""
        return max((int(line) for line in re.findall(rb"\x1b\[(\d+);\d+H", self.output[since:])), default=0)

    def is_restored(self) -> bool:
        left = self.output.rfind(LEAVE_SCREEN)
        return left > self.output.rfind(ENTER_SCREEN) and termios.tcgetattr(self._slave) == self.modes
