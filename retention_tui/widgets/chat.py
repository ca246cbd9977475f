"""A talk with the weights of a running model, while it goes on learning."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.content import Content
from textual.events import Key
from textual.widgets import Input, Static

from engine.commands import CancelGeneration, Command, Generate
from engine.events import AnswerEnded, AnswerStarted, AnswerText, Event
from retention_tui.theme import FAINT
from retention_tui.wording import printable

ANSWERS_KEPT = 100
CURSOR = "▌"
_REASONS = {"length": "full length", "end of text": ""}


class Turn(Vertical):
    """A prompt and its answer as it comes in; markup and control characters in them are shown, not obeyed."""

    def __init__(self, answer: str, prompt: str) -> None:
        super().__init__()
        self.answer, self.prompt, self.text = answer, prompt, ""
        self.ended = self.cancelled = False
        self._pieces = 0
        self._began: AnswerStarted | None = None
        self._about = ""
        self._changed = False

    def compose(self) -> ComposeResult:
        with Horizontal():
            yield Static("you", classes="who")
            yield Static(Content(printable(self.prompt)), classes="said")
        with Horizontal():
            yield Static("model", classes="who")
            yield Static(Content.styled("waiting for the micro-batch to end…", FAINT), classes="said answer")
        yield Static("", classes="about")

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
                self._about = self._describe(self._pieces, seconds, "Esc cancels")
            case AnswerEnded():
                self.ended = True
                tokens = event.tokens or self._pieces  # who says that the connection was lost has not counted
                self._about = self._describe(tokens, event.seconds, _REASONS.get(event.reason, event.reason))

    def show(self) -> None:
        """Draws what has come since the last call: once for many tokens."""
        if self._changed and self.is_mounted:
            self._changed = False
            self.query_one(".answer", Static).update(Content(printable(self.text) + ("" if self.ended else CURSOR)))
            self.query_one(".about", Static).update(Content(self._about))

    def _describe(self, tokens: int, seconds: float, more: str) -> str:
        parts = [f"weights of step {self._began.step:,}"] if self._began else []
        parts.append(f"{tokens:,} tokens")
        if seconds > 0 and tokens > 1:
            parts.append(f"{tokens / seconds:.0f} tok/s")
        return " · ".join([*parts, more] if more else parts)


class Chat(Vertical):
    """Transcript and input. `send` hands a command to the engine; `take` gets every event of the run."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "leave", "Cancel or leave")]

    def __init__(self, send: Callable[[Command], None], *, id: str | None = None) -> None:
        super().__init__(id=id)
        self._send = send
        self._turns: dict[str, Turn] = {}

    def compose(self) -> ComposeResult:
        with VerticalScroll(id="transcript", can_focus=False):
            yield Static(
                "The model that is being trained answers with its weights of this moment; training goes on.\n"
                "It continues text: give it a beginning.",
                id="empty",
            )
        yield Input(placeholder="a beginning…   Enter sends, Esc leaves", id="prompt", select_on_focus=False)

    def on_mount(self) -> None:
        self.query_one("#transcript", VerticalScroll).anchor()
        self.query_one("#prompt", Input).cursor_blink = False

    @property
    def streaming(self) -> Turn | None:
        """The newest answer that has not ended."""
        return next((turn for turn in reversed(self._turns.values()) if not turn.ended), None)

    def focus_input(self) -> None:
        self.query_one("#prompt", Input).focus()

    def close(self, why: str = "the run has ended; nobody is left to answer") -> None:
        """Takes no more questions."""
        prompt = self.query_one("#prompt", Input)
        prompt.placeholder = why
        prompt.disabled = True

    def take(self, event: Event) -> None:
        """Takes any event of the run; those about answers go to their turn."""
        if isinstance(event, AnswerStarted | AnswerText | AnswerEnded) and (turn := self._turns.get(event.answer)):
            turn.take(event)

    def show_answers(self) -> None:
        """Brings to the screen what the answers have taken."""
        for turn in self._turns.values():
            turn.show()

    async def on_input_submitted(self, event: Input.Submitted) -> None:
        event.stop()
        if not event.value.strip():
            return
        event.input.clear()
        self.query("#empty").remove()
        turn = Turn(uuid.uuid4().hex, event.value)
        self._turns[turn.answer] = turn
        transcript = self.query_one("#transcript", VerticalScroll)
        await transcript.mount(turn)
        transcript.anchor()
        while len(self._turns) > ANSWERS_KEPT:
            oldest = next(iter(self._turns))
            await self._turns.pop(oldest).remove()
        self._send(Generate(answer=turn.answer, prompt=event.value))

    def action_leave(self) -> None:
        """Cancels the answer that is coming in; otherwise, or the second time, gives the keys back to the screen."""
        if (turn := self.streaming) and not turn.cancelled:
            turn.cancelled = True
            self._send(CancelGeneration(answer=turn.answer))
        else:
            self.screen.set_focus(None)

    def on_key(self, event: Key) -> None:
        transcript = self.query_one("#transcript", VerticalScroll)
        if event.key in ("pageup", "pagedown"):
            event.stop()
            (transcript.scroll_page_up if event.key == "pageup" else transcript.scroll_page_down)()
