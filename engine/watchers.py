"""Those who watch a run from elsewhere: what each has asked for and not yet read, and what a new one must hear."""

from __future__ import annotations

import json
import socket
import time
from collections import deque
from operator import itemgetter
from typing import Any

from engine.events import (
    Alarm,
    AnswerEnded,
    AnswerStarted,
    AnswerText,
    Event,
    LoadingProgress,
    MemoryHeld,
    Reading,
    RunOpened,
    StateChanged,
    StepCompleted,
    Validated,
)
from engine.wire import LONGEST_COMMAND_BYTES, Lines

EVENTS_KEPT = 200
"""What was said of late and a watcher that comes late is told; what came before, it finds in the store."""
_STANDING = (StepCompleted, Reading, LoadingProgress, MemoryHeld, StateChanged, RunOpened)
"""Of these the newest is told, however long ago it was."""
_GREETING_SECONDS = 10.0
_STALL_SECONDS = 60.0
_STEPS_WAITING = 2048
_LINES_WAITING = 4096  # of what is never thinned out: who leaves that many unread has stopped reading


class Present:
    """Where the run stands, as the events that somebody who comes late has to hear."""

    def __init__(self) -> None:
        self._said: deque[tuple[int, Event]] = deque(maxlen=EVENTS_KEPT)
        self._newest: dict[type[Event], tuple[int, Event]] = {}
        self._count = 0

    def take(self, event: Event) -> int | None:
        """Its number, counted from 1; none where it is a piece of an answer, which is its asker's alone."""
        if isinstance(event, AnswerStarted | AnswerText | AnswerEnded):
            return None
        self._count += 1
        if isinstance(event, RunOpened):  # it may have gone back: what was measured beyond is of no account now
            kept = (item for item in self._said if not (isinstance(item[1], Validated) and item[1].step > event.step))
            self._said = deque(kept, maxlen=EVENTS_KEPT)
        if isinstance(event, _STANDING):
            self._newest[type(event)] = (self._count, event)
        if isinstance(event, Alarm) and StepCompleted in self._newest:
            self._said.append(self._newest[StepCompleted])  # an alarm is marked at its step
        if not isinstance(event, StepCompleted | Reading | LoadingProgress):
            self._said.append((self._count, event))
        return self._count

    def events(self) -> list[tuple[int, Event]]:
        """With their numbers, oldest first."""
        kept = dict((*self._said, *self._newest.values()))
        return sorted(kept.items(), key=itemgetter(0))


class Watcher:
    """One connection: what it asked for, and what it has not read yet."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.lines = Lines(LONGEST_COMMAND_BYTES)
        self.welcome = self.looks_only = False
        self.refusals = 0
        self.answers: set[str] = set()
        self._waiting: deque[tuple[bytes, bool]] = deque()  # a line, and whether it may be left out
        self._passing = 0
        self._begun = b""  # the rest of a line of which a part was sent
        self._since = time.monotonic()  # when it connected, or last read something

    @property
    def waiting(self) -> bool:
        return bool(self._waiting or self._begun)

    def put(self, event: Event, line: bytes) -> None:
        """Queues an event for it. It hears its own answers only; of old steps it may miss some, of the rest nothing."""
        if not self.welcome:
            return
        if isinstance(event, AnswerStarted | AnswerText | AnswerEnded):
            if event.answer not in self.answers:
                return
            if isinstance(event, AnswerEnded):
                self.answers.discard(event.answer)
        passing = isinstance(event, StepCompleted | Reading | LoadingProgress)
        self._queue(line, passing)
        self._passing += passing
        if self._passing > 2 * _STEPS_WAITING:
            self._thin_out()

    def say(self, message: dict[str, Any]) -> None:
        """Queues a message that is no event."""
        self._queue(json.dumps(message).encode() + b"\n", False)

    def flush(self) -> None:
        """Sends as much as it takes now. Raises `OSError` when it is gone."""
        try:
            while self.waiting:
                if not self._begun:
                    self._begun = self._take()
                self._begun = self._begun[self.socket.send(self._begun) :]
                self._since = time.monotonic()
        except BlockingIOError:
            pass

    def reason_to_leave(self, now: float) -> str:
        """Why it is to be dropped; empty while it is not."""
        idle_seconds = now - self._since
        if not self.welcome:
            return "it did not say hello" if idle_seconds > _GREETING_SECONDS else ""
        if self.waiting and idle_seconds > _STALL_SECONDS:
            return f"it has read nothing for {idle_seconds:.0f} s"
        return "it does not read" if len(self._waiting) - self._passing > _LINES_WAITING else ""

    def _queue(self, line: bytes, passing: bool) -> None:
        if not self.waiting:
            self._since = time.monotonic()
        self._waiting.append((line, passing))

    def _take(self) -> bytes:
        """Some 64 KiB of whole lines."""
        taken, size = [], 0
        while self._waiting and size < 65536:
            line, passing = self._waiting.popleft()
            self._passing -= passing
            taken.append(line)
            size += len(line)
        return b"".join(taken)

    def _thin_out(self) -> None:
        surplus, kept = self._passing - _STEPS_WAITING, deque[tuple[bytes, bool]]()
        for line, passing in self._waiting:
            if surplus and passing:
                surplus -= 1
            else:
                kept.append((line, passing))
        self._waiting, self._passing = kept, _STEPS_WAITING
