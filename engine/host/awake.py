"""Keeps the system awake while a run trains. The display may sleep, and on macOS had better do so."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence

_SETTLING_SECONDS = 0.3
_PATIENCE_SECONDS = 3.0
_INHIBIT = (
    "systemd-inhibit",
    "--what=sleep:idle",
    "--mode=block",
    "--who=retention-tui",
    "--why=a model is being trained",
)
_HOLD = ("sh", "-c", "echo held; exec cat")
"""Says that the lock is held, and ends with its standard input: with us, however we end."""


class Awake:
    """Blocks the system's sleep from `start` to `stop`, or to this process's end, also by SIGKILL.

    It never keeps a display on (a watchdog kills long Metal kernels under a lit one), and leaves the lid its meaning: a
    laptop that is closed goes to sleep, because what computes in a bag gets hot. The programs it starts have a session
    of their own, so that Ctrl+C is not for them. `platform` is as in `sys.platform`.
    """

    def __init__(self, display_sleep: bool = False, platform: str = sys.platform) -> None:
        self._display_sleep, self._platform = display_sleep, platform
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> str:
        """Says in one line what it did, or why it could not; never raises. Takes a few tenths of a second."""
        self.stop()
        if self._platform != "darwin":
            return self._inhibit()
        said = self._caffeinate()
        return f"{said}; {_put_display_to_sleep()}" if self._display_sleep else said

    def stop(self) -> None:
        """Lets the system sleep again. Harmless before `start`, and twice."""
        process, self._process = self._process, None
        if process is None:
            return
        _close(process)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_SETTLING_SECONDS)
        if process.poll() is None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_PATIENCE_SECONDS)
        if process.poll() is None:
            process.kill()

    def _caffeinate(self) -> str:
        process = _launch(("caffeinate", "-is", "-w", str(os.getpid())))
        if isinstance(process, str):
            return f"the system may sleep: {process}"
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_SETTLING_SECONDS)
        if process.poll() is not None:
            return f"the system may sleep: caffeinate ended at once{_why(process)}"
        self._process = process
        return "caffeinate keeps the system awake, on mains power"

    def _inhibit(self) -> str:
        process = _launch((*_INHIBIT, *_HOLD))
        if isinstance(process, str):
            return f"the system may sleep: {process}"
        assert process.stdout is not None
        deadline = time.monotonic() + _PATIENCE_SECONDS
        answered, _, _ = select.select([process.stdout], [], [], deadline - time.monotonic())
        if answered and process.stdout.readline() == b"held\n":
            self._process = process
            return "systemd-inhibit keeps the system awake; closing the lid still puts it to sleep"
        said = f"the system may sleep: systemd-inhibit {'refused' if answered else 'did not answer'}"
        if not answered:
            process.kill()
            _close(process)
            return said
        ...


def blocker(platform: str = sys.platform) -> str | None:
    """The program that keeps this system awake, if it is installed."""
    return shutil.which("caffeinate" if platform == "darwin" else "systemd-inhibit")
