"""The machine under a run: memory pressure, swap, power, heat and lid, on macOS and Linux behind one interface.

Importing any part of it is harmless anywhere; what is one system's own is only done on that system.
"""

from __future__ import annotations

import sys
from typing import Protocol

from engine.events import Reading


class Machine(Protocol):
    """A machine that can be looked at."""

    def read(self) -> Reading:
        """One look. Takes milliseconds, waits for nothing, and leaves None what it cannot know."""


def this_machine(patient: bool = False) -> Machine:
    """The machine that this process runs on. A `patient` one waits for its programs' first answers."""
    if sys.platform == "darwin":
        from engine.host.macos import MacMachine

        return MacMachine(patient=patient)
    from engine.host.linux import LinuxMachine

    return LinuxMachine(patient=patient)
