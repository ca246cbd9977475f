"""Watches over a run from a thread of its own: what the machine is like, and whether the run still moves."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue

from engine.events import Alarm, Event, Notice, Reading
from engine.guards import Warn
from engine.guards.hang import HangGuard
from engine.host import Machine
from engine.host.awake import Awake
from engine.host.mlx_variables import set_mlx_variables
from engine.host.watch import Watch
from engine.lines import LineWriter
from engine.profile import Profile
from engine.store import RunDirectory


class Vigil:
    """Made for one run, started and stopped by its engine.

    Readings are published as they come, and kept for the trainer, who stores them and lets the guards see them. An
    alarm that the trainer cannot raise, because it hangs, is published and logged here, and stored by it later.
    """

    def __init__(
        self,
        run: RunDirectory,
        profile: Profile,
        publish: Callable[[Event], None],
        machine: Machine | None = None,
        every_seconds: float = 1.0,
    ) -> None:
        self._run, self._publish = run, publish
        self.hang = HangGuard(profile.guard.hang_factor, profile.guard.hang_seconds)
        self._watch = Watch(self._take, machine, every_seconds)
        self._host = profile.host
        self._awake = Awake(profile.host.display_sleep) if profile.host.keep_awake else None
        self._blocks_sleep = False
        self._waking = threading.Thread(target=self._keep_awake, name="awake", daemon=True)
        self._kept: SimpleQueue[Event] = SimpleQueue()

    def start(self) -> None:
        """Begins to watch, and keeps the machine awake; notices say how, or why not, and what else was not granted."""
        for refusal in set_mlx_variables(self._host):
            self._say(Notice(text=refusal))
        self._watch.start()
        if self._awake is not None:
            self._waking.start()

    def stop(self) -> None:
        """Ends both. Harmless before `start`."""
        self._watch.stop()
        if self._awake is not None and self._waking.ident is not None:
            self._waking.join()
            self._awake.stop()

    def kept(self) -> list[Event]:
        """What was published since the last call and is not yet stored, oldest first."""
        events: list[Event] = []
        with suppress(Empty):
            while True:
                events.append(self._kept.get_nowait())
        return events

    def _keep_awake(self) -> None:
        assert self._awake is not None
        self._say(Notice(text=self._awake.start()))  # programs are asked, which may take seconds
        self._blocks_sleep = self._awake.held

    def _take(self, reading: Reading) -> None:
        self._publish(reading)
        self._kept.put(reading)
        if self._awake is not None and self._blocks_sleep and not self._awake.held:
            self._blocks_sleep = False
            self._say(
                Alarm(level="warning", text="what kept the system awake has ended: it may sleep", guard="machine")
            )
        match self.hang.judge():
            case Warn(guard=guard, text=text):
                self._say(Alarm(level="critical", text=text, guard=guard))
            case tell if tell is not None:
                self._say(Notice(text=tell.text))

    def _say(self, event: Event) -> None:
        with suppress(OSError), self._run.log_path.open("a", encoding="utf-8") as log:
            log.writelines(line + "\n" for line in LineWriter(with_clock=True).lines(event))
        self._publish(event)
        self._kept.put(event)
