"""What happens while a run's data and model are made ready: told as it goes, and ended where it is asked for."""

from __future__ import annotations

import time
from collections.abc import Callable
from queue import Empty, SimpleQueue

from engine.commands import Command, Stop
from engine.events import Alarm, Event, LoadingProgress, Notice

_TOLD_EVERY_SECONDS = 0.25


class Interrupted(Exception):
    """The run shall end before it has begun: why, and what it was at, in words."""


class Loading:
    """Handed to what takes long: downloads, a base that is pretrained here, rows that are tokenized.

    On the worker's thread alone. Commands that come meanwhile wait in the inbox's place; `heard` gives them back.
    """

    def __init__(
        self, say: Callable[[Event], None] = lambda event: None, inbox: SimpleQueue[Command] | None = None
    ) -> None:
        self._say, self._inbox = say, inbox
        self._heard: list[Command] = []
        self._what = ""
        self._told: tuple[str, float] = ("", 0.0)

    def progress(self, what: str, done: float, total: float | None, unit: str = "") -> None:
        """Tells how far something is, four times a second at most; `unit` is `bytes`, `steps` or `rows`.

        `what` says it as in `loading: downloading Qwen2.5-1.5B`.
        Raises `Interrupted` where the run was asked to end.
        """
        self._what = what
        self.listen()
        now = time.monotonic()
        if what != self._told[0] or now - self._told[1] >= _TOLD_EVERY_SECONDS or done == total:
            self._told = (what, now)
            self._say(LoadingProgress(what=what, done=done, total=total, unit=unit))
        if done == total:
            self._what = ""

    def tell(self, text: str) -> None:
        self._say(Notice(text=text))

    def warn(self, text: str) -> None:
        self._say(Alarm(level="warning", text=text))

    def listen(self) -> None:
        """Raises `Interrupted` where the run was asked to end."""
        if self._inbox is None:
            return
        try:
            while True:
                self._heard.append(self._inbox.get_nowait())
        except Empty:
            pass
        for command in self._heard:
            if isinstance(command, Stop):
                raise Interrupted(f"{command.reason} while {self._what}" if self._what else command.reason)

    def heard(self) -> list[Command]:
        """What was asked for meanwhile, once."""
        heard, self._heard = self._heard, []
        return heard
