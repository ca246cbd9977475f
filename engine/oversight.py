"""Shows the guards of machine and clock what they judge by, and gathers what they want done."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from engine.events import Alarm, Event, Reading
from engine.guards import Action, Tell, Warn
from engine.guards.leak import LeakGuard
from engine.guards.limits import TimeLimits
from engine.guards.machine import MachineGuard
from engine.guards.memory import MemoryGuard
from engine.journal import Journal
from engine.profile import Guard as Settings


class Oversight:
    """The trainer asks it between micro-batches. `news` gives what came from the machine since the last call."""

    def __init__(self, settings: Settings, journal: Journal, news: Callable[[], list[Event]]) -> None:
        self._journal, self._news = journal, news
        self._memory = MemoryGuard(settings.memory)
        self._machine = MachineGuard(settings.memory)
        self._leak = LeakGuard(settings.memory.leak_hours)
        self._began = time.time()
        self.limit(settings)

    def limit(self, settings: Settings) -> None:
        """Takes the time limits anew: that clock's next time from now, hours from the beginning of this attempt."""
        self._limits = TimeLimits(settings.stop_at, settings.max_hours, self._began, time.time())

    def actions(self, held: bool) -> Iterator[Action]:
        """What is to be done now; `held` says whether a guard still holds the run, which its owner may have overruled.

        Readings are stored on the way, and so is what was said while the journal could not.
        """
        if self._memory.holding and not held:
            self._memory.overrule()
        for event in self._news():
            self._journal.store(event)
            if isinstance(event, Reading):
                yield from self._judge(event)
        if end := self._limits.judge(time.time()):
            yield end

    def _judge(self, reading: Reading) -> Iterator[Action]:
        if action := self._memory.judge(reading):
            yield action
        if warning := self._leak.judge(reading):
            yield warning
        for said in self._machine.judge(reading):
            if isinstance(said, Alarm):
                yield Warn("machine", said.text, critical=said.level == "critical")
            else:
                yield Tell(said.text)
