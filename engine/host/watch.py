"""Looks at the machine once a second, off the training thread."""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable

from engine.events import Reading
from engine.host import Machine, this_machine
from engine.host.signs import known

_LAST_LOOK_SECONDS = 2.0


class Watch:
    """A daemon thread that hands each reading to `take`, in that thread.

    It outlives whatever fails: a look that does gives a reading of which nothing is known, and a `take` that does is
    reported on standard error. `machine` is this one if None.
    """

    def __init__(
        self, take: Callable[[Reading], None], machine: Machine | None = None, every_seconds: float = 1.0
    ) -> None:
        self._take, self._every = take, every_seconds
        self._machine = machine or this_machine()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="host watch", daemon=True)

    def start(self) -> None:
        """Begins; the first reading comes at once."""
        self._thread.start()

    def stop(self) -> None:
        """Ends it; waits for a reading under way, two seconds at most. Harmless before `start`, and twice."""
        self._stopped.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(_LAST_LOOK_SECONDS)

    def _watch(self) -> None:
        due = time.monotonic()
        while not self._stopped.wait(max(0.0, due - time.monotonic())):
            reading = known(self._machine.read) or Reading()
            if self._stopped.is_set():
                return
            try:
                self._take(reading)
            except Exception:
                traceback.print_exc()
            due += self._every
            if due <= time.monotonic():  # what was missed, in a system's sleep say, is not made up for
                due = time.monotonic() + self._every
