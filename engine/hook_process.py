"""A command of the user's own as a process: what it is told, what it said, and how it is ended in time."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import time

_OUTPUT_KEPT_BYTES = 4096
_GRACE_SECONDS = 1.0


def run_hook(command: str | list[str], sent: bytes, variables: dict[str, str], limit_seconds: float) -> tuple[str, str]:
    """Runs a command with `sent` on standard input; returns what went wrong (empty: nothing) and what it printed.

    It has a process group of its own, which is ended once the time is up. Of what it prints the first 4 kB are kept.
    Raises `OSError` where it cannot be started.
    """
    process = subprocess.Popen(
        command,
        shell=isinstance(command, str),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, **variables},
        start_new_session=True,  # Ctrl+C is for the run
    )
    deadline = time.monotonic() + limit_seconds
    with process:
        try:
            output = _talk(process, sent, deadline)
            code = process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired as expired:
            return f"it took longer than {limit_seconds:g} s and was ended", _decode(expired.output or b"")
        finally:
            if process.poll() is None:
                _end(process)
    return "" if code == 0 else _in_words(code), _decode(output)


def _talk(process: subprocess.Popen[bytes], sent: bytes, deadline: float) -> bytes:
    """Writes to the process and reads from it until it has ended, or has nothing more to say."""
    assert process.stdin is not None and process.stdout is not None
    output = bytearray()
    with selectors.DefaultSelector() as selector:
        for stream, direction in ((process.stdin, selectors.EVENT_WRITE), (process.stdout, selectors.EVENT_READ)):
            os.set_blocking(stream.fileno(), False)
            selector.register(stream, direction)
        while process.stdout in selector.get_map():
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(process.args, 0, bytes(output))
            ready = [key.fileobj for key, _ in selector.select(0.1)]
            if process.stdin in ready:
                sent = _write_some(process.stdin.fileno(), sent)
                if not sent:
                    selector.unregister(process.stdin)
                    process.stdin.close()
            if process.stdout in ready:
                read = os.read(process.stdout.fileno(), 65536)
                output += read[: _OUTPUT_KEPT_BYTES - len(output)]
                if not read:
                    selector.unregister(process.stdout)
            elif process.poll() is not None:  # something that it left behind has its output open
                with contextlib.suppress(BlockingIOError):  # what it said at the very last
                    output += os.read(process.stdout.fileno(), _OUTPUT_KEPT_BYTES - len(output))
                break
    return bytes(output)


def _write_some(descriptor: int, data: bytes) -> bytes:
    """What is left to be written; nothing once the reader has closed."""
    try:
        return data[os.write(descriptor, data) :]
    except BlockingIOError:
        return data
    except BrokenPipeError:
        return b""


def _end(process: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE_SECONDS)


def _in_words(code: int) -> str:
    return f"exit code {code}" if code > 0 else f"ended by {signal.Signals(-code).name}"


def _decode(output: bytes) -> str:
    return output.decode(errors="replace")
