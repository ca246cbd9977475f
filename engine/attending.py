"""What happens between micro-batches: chats have their share of the time, errands are done, pauses are kept."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from engine.answers import Answers
from engine.controls import Controls
from engine.events import State
from engine.guards.hang import HangGuard
from engine.journal import Journal

CHAT_SHARE = 0.75
"""Time for open chats, as a part of what the micro-batch before took: with the rest of a step, training keeps half."""


class Abandoned(Exception):
    """What is under way shall not be ended: it is done again, with the same numbers, if the run goes on."""


class Attendant:
    """Serves a run's owner, guards and chats. `errands` does what commands and guards have asked for by now."""

    def __init__(
        self, journal: Journal, controls: Controls, answers: Answers, hang: HangGuard, errands: Callable[[], None]
    ) -> None:
        self._journal, self._controls, self._answers, self._hang = journal, controls, answers, hang
        self._errands = errands
        self.aside_seconds = 0.0
        """Time since it was last set to 0 that was not training's: errands' and pauses'."""
        self._paused_seconds = 0.0
        self._served_at = time.monotonic()

    def begin(self) -> None:
        """From now on time is spent on what chats have a share of."""
        self._served_at = time.monotonic()

    def serve(self) -> None:
        """Gives chats their share, does errands, and waits while the run is paused or held."""
        self.attend()
        self.hold()

    def attend(self) -> None:
        """As `serve`, without waiting."""
        self._hang.beat()
        self._controls.listen()
        self._answers.serve(CHAT_SHARE * (time.monotonic() - self._served_at))
        self._errands()
        self._served_at = time.monotonic()

    def between_layers(self) -> None:
        """As `serve`, with a micro-batch under way that is abandoned where the run ends, or a guard holds it.

        Its memory is what a guard wants back; a pause of the owner's leaves it as it is.
        """
        self.attend()
        if self._controls.ending or self._controls.held:
            raise Abandoned
        self.hold()

    def hold(self) -> None:
        """Waits while paused or held; chats and errands are served meanwhile."""
        if not self._controls.waits():
            return
        state, paused_at = self._journal.state, time.monotonic()
        with self.aside():
            self._journal.enter(State.PAUSED, self._controls.held)
            try:
                while self._controls.waits():
                    self._hang.rest()
                    self._controls.listen(0.0 if self._answers else 0.5)
                    self._answers.serve(0.0)
                    self._errands()
            finally:
                self._hang.beat()
                if not self._controls.ending:
                    self._journal.enter(state)
        self._paused_seconds += time.monotonic() - paused_at
        self._served_at = time.monotonic()

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Time inside is not the step's; what is nested counts once."""
        before, started = self.aside_seconds, time.monotonic()
        try:
            yield
        finally:
            self.aside_seconds = before + time.monotonic() - started

    def paused_seconds(self) -> float:
        """Spent in pauses since the last call."""
        seconds, self._paused_seconds = self._paused_seconds, 0.0
        return seconds
