"""One question and its answers: by the weights of now, by those of the beginning, or by both side by side."""

from __future__ import annotations

import uuid
from collections.abc import Sequence

from textual.app import ComposeResult
from textual.containers import Container, Horizontal, Vertical, VerticalScroll
from textual.content import Content
from textual.message import Message
from textual.widgets import Static

from engine.commands import Generate
from engine.events import AnswerEnded, AnswerStarted, AnswerText, Event
from retention_tui.theme import FAINT
from retention_tui.wording import printable

CURSOR = "▌"
_REASONS = {"length": "full length", "end of text": ""}
_NOT_YET = "waiting for the micro-batch to end…"
_NOT_SAID = "(nothing)"
_LEAST_LINES = 3
"""Of an answer with its frame."""


class Said(Static):
    """The text of an answer."""

    class Grown(Message):
        """It takes more lines now, or fewer."""

    def on_resize(self) -> None:
        self.post_message(self.Grown())


class Answer(VerticalScroll):
    """An answer as it comes in; markup and control characters in it are shown, not obeyed.

    Its frame says whose it is, and how fast and how long it was.
    """

    def __init__(self, ask: Generate) -> None:
        super().__init__(can_focus=False)
        self.ask, self.text = ask, ""
        self.ended = False
        self._pieces = 0
        self._began: AnswerStarted | None = None
        self._about = ""
        self._changed = True

    def compose(self) -> ComposeResult:
        yield Said(Content.styled(_NOT_YET, FAINT), classes="said")

    def on_mount(self) -> None:
        self.show()

    @property
    def wanted_height(self) -> int:
        """Lines in which all of it can be seen."""
        return self.query_one(Said).outer_size.height + self.gutter.height

    def take(self, event: Event) -> None:
        """Takes the next event of this answer; `show` brings it to the screen."""
        self._changed = True
        match event:
            case AnswerStarted():
                self._began = event
            case AnswerText():
                self.text += event.text
                self._pieces += 1
                seconds = event.time - self._began.time if self._began else 0.0
                self._about = _speed(self._pieces, seconds, "Esc cancels")
            case AnswerEnded():
                self.ended = True
                tokens = event.tokens or self._pieces  # who says that the connection was lost has not counted
                self._about = _speed(tokens, event.seconds, _REASONS.get(event.reason, event.reason))

    def show(self) -> None:
        """Draws what has come since the last call: once for many tokens."""
        if self._changed and self.is_mounted:
            self._changed = False
            self.border_title = self._whose()
            self.border_subtitle = Content.styled(printable(self._about), FAINT)
            if self.text or self.ended:
                said = Content(printable(self.text)) if self.text else Content.styled(_NOT_SAID, FAINT)
                self.query_one(Said).update(said + ("" if self.ended else CURSOR))

    def _whose(self) -> Content:
        if self.ask.base:
            return Content.assemble(("base", "bold $secondary"), (" · before training", FAINT))
        of = f" · weights of step {self._began.step:,}" if self._began else ""
        return Content.assemble(("live", "bold $primary"), (of, FAINT))


class Turn(Vertical):
    """A prompt, and an answer for each way to ask it: beside each other where there is room, else one above the other.

    `asks` are the same question, by `base` or not.
    """

    def __init__(self, asks: Sequence[Generate]) -> None:
        super().__init__()
        self._prompt = asks[0].prompt
        self.answers = [Answer(ask) for ask in asks]
        self.cancelled = False

    def compose(self) -> ComposeResult:
        with Horizontal(classes="question"):
            yield Static("you", classes="who")
            yield Static(Content(printable(self._prompt)), classes="said")
        with Container(classes="answers"):
            yield from self.answers

    @property
    def ended(self) -> bool:
        """Whether nothing more comes in."""
        return all(answer.ended for answer in self.answers)

    def show(self) -> None:
        """Brings to the screen what the answers have taken."""
        for answer in self.answers:
            answer.show()

    def fit(self, lines: int | None) -> None:
        """Keeps several answers within so many lines, question and all: else a long one would push a short one out of
        sight. What one leaves, another takes; None lets each have what it wants."""
        if len(self.answers) < 2 or not self.is_mounted:
            return
        if lines is None:
            for answer in self.answers:
                answer.styles.max_height = None
            return
        room = lines - self.query_one(".question").outer_size.height - self.styles.margin.height
        wanted = [answer.wanted_height for answer in self.answers]
        layout = self.query_one(".answers").styles.layout
        stacked = layout is not None and layout.name == "vertical"
        for index, answer in enumerate(self.answers):
            others = sum(wanted) - wanted[index] if stacked else 0
            share = room // len(self.answers) if stacked else room
            answer.styles.max_height = max(_LEAST_LINES, share, room - others)


def new_answer() -> str:
    """A name for an answer that nobody else has."""
    return uuid.uuid4().hex


def _speed(tokens: int, seconds: float, more: str) -> str:
    parts = [f"{tokens:,} token{'' if tokens == 1 else 's'}"]
    if seconds > 0 and tokens > 1:
        parts.append(f"{tokens / seconds:.0f} tok/s")
    return " · ".join([*parts, more] if more else parts)
