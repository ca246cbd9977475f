"""Keeps the system awake while a run trains. The display may sleep, and on macOS had better do so."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import subprocess
import sys

_SETTLING_SECONDS = 0.3
_PATIENCE_SECONDS = 3.0
_INHIBIT = ("systemd-inhibit", "--what=sleep:idle", "--mode=block", "--who=retention-tui", "--why=a model is trained")
_HOLD = ("sh", "-c", "echo held; exec cat")
"""Says that the lock is held, and ends with its standard input: with us, however we end."""


class Awake:
    """Blocks the system's sleep from `start` to `stop`, or to this process's end, also by SIGKILL.

    It never keeps a display on (a watchdog kills long Metal kernels under a lit one), and leaves the lid its meaning: a
    laptop that is closed goes to sleep, because what computes in a bag gets hot. The program that does it has a session
    of its own, so that Ctrl+C is not for it. `platform` is as in `sys.platform`.
    """

    def __init__(self, display_sleep: bool = False, platform: str = sys.platform) -> None:
        self._display_sleep, self._platform = display_sleep, platform
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> str:
        """Says in one line what it did, or why it could not; never raises. Takes tenths of a second, 3 at worst."""
        self.stop()
        try:
            said = self._caffeinate() if self._platform == "darwin" else self._inhibit()
        except _Refused as refusal:
            said = f"the system may sleep: {refusal}"
        if self._display_sleep:
            said = f"{said}; {_put_display_to_sleep(self._platform)}"
        return said

    @property
    def held(self) -> bool:
        """Whether the program that blocks sleep is there."""
        return self._process is not None and self._process.poll() is None

    def stop(self) -> None:
        """Lets the system sleep again. Harmless before `start`, and twice."""
        if self._process is not None:
            _end(self._process)
            self._process = None

    def _caffeinate(self) -> str:
        process = _launch("caffeinate", "-is", "-w", str(os.getpid()))
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_SETTLING_SECONDS)
            raise _Refused(f"caffeinate ended at once{_last_words(process)}")
        self._process = process
        return "caffeinate keeps the system awake, wholly so on mains power only"

    def _inhibit(self) -> str:
        process = _launch(*_INHIBIT, *_HOLD)
        assert process.stdout is not None
        answered, _, _ = select.select([process.stdout], [], [], _PATIENCE_SECONDS)
        if not answered:
            _end(process)
            raise _Refused("systemd-inhibit did not answer")
        if process.stdout.readline() != b"held\n":
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_SETTLING_SECONDS)
            raise _Refused(f"systemd-inhibit could not block it{_last_words(process)}")
        self._process = process
        return "systemd-inhibit keeps the system awake; closing the lid still puts it to sleep"


class _Refused(Exception):
    """Sleep could not be blocked; the reason in words."""


def blocker(platform: str = sys.platform) -> str | None:
    """Where the program is that keeps such a system awake; None where it is not installed."""
    return shutil.which("caffeinate" if platform == "darwin" else _INHIBIT[0])


def _launch(program: str, *arguments: str) -> subprocess.Popen[bytes]:
    path = shutil.which(program)
    if path is None:
        raise _Refused(f"there is no {program}")
    try:
        return subprocess.Popen(
            [path, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
    except OSError as error:
        raise _Refused(f"{program} cannot be started: {error.strerror}") from None


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends it gently, and then not."""
    assert process.stdin is not None
    process.stdin.close()
    for end in (lambda: None, process.terminate, process.kill):
        end()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_SETTLING_SECONDS)
            break
    for output in (process.stdout, process.stderr):
        assert output is not None
        output.close()


def _last_words(process: subprocess.Popen[bytes]) -> str:
    """What a program that has failed wrote on standard error, in a line; ends it."""
    assert process.stderr is not None
    os.set_blocking(process.stderr.fileno(), False)  # what it started and left behind may hold the other end
    words = " ".join((process.stderr.read() or b"").decode(errors="replace").split())
    _end(process)
    return f": {words}" if words else f" (exit status {process.returncode})"


def _put_display_to_sleep(platform: str) -> str:
    if platform != "darwin":
        return "display_sleep is for macOS"
    try:
        subprocess.run(["pmset", "displaysleepnow"], capture_output=True, timeout=_PATIENCE_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return "the display could not be put to sleep"
    return "its display sleeps"
