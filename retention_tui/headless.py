"""A run without a screen: its lines, or its events as JSON, on standard output."""

from __future__ import annotations

import os
import select
import sys
import threading
from collections import deque
from contextlib import suppress
from pathlib import Path

from engine.events import Event, RunEnded, State, to_json
from engine.lines import LineWriter
from retention_tui.client import Client, ConnectionLost

_LINES_KEPT = 20_000
_PATIENCE_SECONDS = 2.0


def follow(client: Client, *, as_json: bool = False) -> bool:
    """Prints what the run says until nothing more will come; false if somebody else has heard the end already.

    In words, a failure's reason is left to the caller. Output that nobody reads, or not now, never holds up the run
    or its end.
    """
    writer, printer = LineWriter(), Printer(client.run.log_path)
    while True:
        alive = client.alive
        events = client.events(timeout_seconds=0.5)
        for event in events:
            if printer.listening:
                for line in [to_json(event)] if as_json else _lines(writer, event):
                    printer.print(line)
            if isinstance(event, RunEnded | ConnectionLost):
                printer.finish()
                return True
        if not alive and not events:
            printer.finish()
            return False


class Printer:
    """Lines on standard output, in order, from a thread of its own: whoever prints never waits for the reader.

    A reader that stalls (`| less`, Ctrl+S) loses the oldest lines beyond the newest 20,000; after one that has gone,
    all are dropped. The log has them anyway.
    """

    def __init__(self, log: Path) -> None:
        self._log = log
        self._waiting: deque[bytes] = deque(maxlen=_LINES_KEPT)
        self._changed = threading.Condition()
        self._idle = self._listening = True
        sys.stdout.flush()
        # It writes past sys.stdout, whose lock would be held for ever by a thread that the process does not wait for.
        threading.Thread(target=self._work, name="printer", daemon=True).start()

    @property
    def listening(self) -> bool:
        """False once the reader has gone."""
        return self._listening

    def print(self, line: str) -> None:
        """Hands over a line; never waits."""
        with self._changed:
            self._waiting.append(f"{line}\n".encode(sys.stdout.encoding or "utf-8", "replace"))
            self._idle = False
            self._changed.notify_all()

    def finish(self) -> None:
        """Waits until all is printed, or until nothing could be for two seconds."""
        with self._changed:
            while not self._idle and self._changed.wait(_PATIENCE_SECONDS):
                pass

    def _work(self) -> None:
        while True:
            with self._changed:
                self._idle = not self._waiting
                self._changed.notify_all()
                while not self._waiting:
                    self._changed.wait()
                line = self._waiting.popleft()
            if self._listening and not _write(line):
                self._listening = False
                _print_elsewhere(self._log)


def _lines(writer: LineWriter, event: Event) -> list[str]:
    lines = writer.lines(event)
    return lines[:-1] if isinstance(event, RunEnded) and event.state is State.FAILED else lines


def _write(data: bytes) -> bool:
    while data:
        try:
            data = data[os.write(1, data) :]
        except BlockingIOError:
            select.select([], [1], [])
        except OSError:  # a closed pipe or a lost terminal
            return False
    return True


def _print_elsewhere(log: Path) -> None:
    """What could not be printed is dropped, as the log has it; what libraries print goes there from now on."""
    numbers = [1, 2] if os.path.sameopenfile(1, 2) else [1]
    with suppress(OSError), log.open("ab") as file:
        for number in numbers:
            os.dup2(file.fileno(), number)
