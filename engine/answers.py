"""Open chats of a run: each is a generator of text that is advanced between micro-batches."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from engine.commands import Generate
from engine.events import AnswerEnded, AnswerStarted, AnswerText, Event
from engine.tasks import Task


@dataclass
class _Open:
    ask: Generate
    pieces: Iterator[str | None]
    started: float = field(default_factory=time.monotonic)
    tokens: int = 0


class Answers:
    """Serves open chats fairly and within a budget. An answer keeps the weights that it began with."""

    def __init__(self, task: Task, say: Callable[[Event], None]) -> None:
        self._task, self._say = task, say
        self._open: dict[str, _Open] = {}

    def __bool__(self) -> bool:
        return bool(self._open)

    def begin(self, ask: Generate, parameters: Any, step: int) -> None:
        self.cancel(ask.answer)
        self._open[ask.answer] = _Open(ask, self._task.answer(parameters, ask))
        self._say(AnswerStarted(answer=ask.answer, step=step))

    def cancel(self, answer: str, reason: str = "cancelled") -> None:
        """Ends one answer; unknown ones are already over."""
        if answer in self._open:
            self._end(answer, reason)

    def serve(self, budget_seconds: float) -> None:
        """One token for each open answer at least, then more in turn until the budget is spent."""
        deadline = time.monotonic() + budget_seconds
        while self._open:
            for answer in list(self._open):
                self._advance(answer)
            if time.monotonic() >= deadline:
                return

    def end_all(self, reason: str) -> None:
        for answer in list(self._open):
            self._end(answer, reason)

    def _advance(self, answer: str) -> None:
        state = self._open[answer]
        try:
            piece = next(state.pieces)
        except StopIteration:
            self._end(answer, "length" if state.tokens >= state.ask.max_tokens else "end of text")
            return
        except Exception as error:  # a chat must never end a night's training; the asker is told
            self._end(answer, f"failed: {error}")
            return
        if piece is not None:
            state.tokens += 1
            if piece:
                self._say(AnswerText(answer=answer, text=piece))

    def _end(self, answer: str, reason: str) -> None:
        state = self._open.pop(answer)
        seconds = time.monotonic() - state.started
        self._say(AnswerEnded(answer=answer, reason=reason, tokens=state.tokens, seconds=seconds))
