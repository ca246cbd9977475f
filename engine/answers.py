"""Open chats of a run: each is a generator of text that is advanced between micro-batches."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from engine.commands import Generate
from engine.events import AnswerEnded, AnswerStarted, AnswerText, Event
from engine.tasks import Task

AT_ONCE = 2
"""How many answers are made at once, as each has a copy of the weights; others wait for their turn."""


@dataclass
class _Open:
    ask: Generate
    pieces: Iterator[str | None]
    started: float = field(default_factory=time.monotonic)
    tokens: int = 0


class Answers:
    """Serves chats fairly and within a budget.

    `weights` gives the present parameters and their step; an answer keeps those that it began with.
    """

    def __init__(self, task: Task, say: Callable[[Event], None], weights: Callable[[], tuple[Any, int]]) -> None:
        self._task, self._say, self._weights = task, say, weights
        self._waiting: dict[str, Generate] = {}
        self._open: dict[str, _Open] = {}

    def __bool__(self) -> bool:
        return bool(self._open)

    def ask(self, ask: Generate) -> None:
        """Takes a question; its answer begins as soon as there is a place for it."""
        self.cancel(ask.answer)
        self._waiting[ask.answer] = ask
        self._begin()

    def cancel(self, answer: str, reason: str = "cancelled") -> None:
        """Ends one answer; unknown ones are already over."""
        if self._waiting.pop(answer, None):
            self._say(AnswerEnded(answer=answer, reason=reason, tokens=0, seconds=0.0))
        elif answer in self._open:
            self._end(answer, reason)

    def serve(self, budget_seconds: float) -> None:
        """One token for each open answer at least, then more in turn until the budget is spent."""
        deadline, served = time.monotonic() + budget_seconds, 0
        while self._open and (served < len(self._open) or time.monotonic() < deadline):
            answer = next(iter(self._open))
            self._open[answer] = self._open.pop(answer)  # the others are next
            self._advance(answer)
            served += 1

    def end_all(self, reason: str) -> None:
        for answer in [*self._waiting, *self._open]:
            self.cancel(answer, reason)

    def _begin(self) -> None:
        while self._waiting and len(self._open) < AT_ONCE:
            ask = self._waiting.pop(next(iter(self._waiting)))
            try:
                parameters, step = (None, 0) if ask.base else self._weights()
                self._open[ask.answer] = _Open(ask, self._task.answer(parameters, ask))
            except Exception as error:  # as below
                self._say(AnswerEnded(answer=ask.answer, reason=f"failed: {error}", tokens=0, seconds=0.0))
                continue
            self._say(AnswerStarted(answer=ask.answer, step=step))

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
        self._begin()
