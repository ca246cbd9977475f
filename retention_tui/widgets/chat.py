"""A talk with the weights of a running model, while it goes on learning; beside it, those that it began with."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical, VerticalScroll
from textual.events import Key
from textual.widgets import Input, Static

from engine.commands import CancelGeneration, Command, Generate
from engine.events import AnswerEnded, AnswerStarted, AnswerText, Event, RunOpened
from retention_tui.widgets.sampling import Sampling, WeightsChoice
from retention_tui.widgets.turn import Answer, Said, Turn, new_answer

TURNS_KEPT = 100
_KEYS = "Enter sends, Ctrl+T other weights, Esc leaves"
_INVITATIONS = {
    "lora": ("It answers in the form of the chats that it learns from: ask it something.", "a question"),
}
"""What to give a model of a kind, in a sentence and in short."""
_CONTINUES = ("It continues text: give it a beginning.", "a beginning")


class Chat(Vertical):
    """Transcript and input. `send` hands a command to the engine; `take` gets every event of the run."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "leave", "Cancel or leave")]

    def __init__(self, send: Callable[[Command], None], *, id: str | None = None) -> None:
        super().__init__(id=id)
        self._send = send
        self._turns: list[Turn] = []
        self._answers: dict[str, Answer] = {}
        self._kind = ""
        self._typing = False
        """Whether the keys are the chat's, as far as its reader knows."""

    def compose(self) -> ComposeResult:
        yield Sampling()
        with VerticalScroll(id="transcript", can_focus=False):
            yield Static(id="empty")
        yield Input(id="prompt", select_on_focus=False)

    def on_mount(self) -> None:
        self.query_one("#transcript", VerticalScroll).anchor()
        self._prompt.cursor_blink = False
        self._invite()

    @property
    def _prompt(self) -> Input:
        return self.query_one("#prompt", Input)

    def focus_input(self) -> None:
        self._prompt.focus()

    def suit(self, opened: RunOpened) -> None:
        """Speaks of a kind of run. An adapter is compared with its base from the start, which is in memory anyway."""
        if opened.task != self._kind:
            self._kind = opened.task
            if opened.trained_parameters is not None and opened.trained_parameters < opened.parameters:
                self.query_one(WeightsChoice).choose("both")
            self._invite()

    def close(self, why: str = "the run has ended; nobody is left to answer") -> None:
        """Takes no more questions."""
        self._prompt.placeholder = why
        self._prompt.disabled = True

    def take(self, event: Event) -> None:
        """Takes any event of the run; those about answers go where they were asked for."""
        if isinstance(event, AnswerStarted | AnswerText | AnswerEnded) and (answer := self._answers.get(event.answer)):
            answer.take(event)

    def show_answers(self) -> None:
        """Brings to the screen what the answers have taken."""
        for turn in self._turns:
            turn.show()

    def next_weights(self) -> None:
        """Live, base, both, and again."""
        self.query_one(WeightsChoice).choose_next()

    async def on_input_submitted(self, event: Input.Submitted) -> None:
        event.stop()
        if not event.value.strip():
            return
        event.input.clear()
        self.query("#empty").remove()
        sampling = self.query_one(Sampling)
        values = sampling.values()
        asks = [Generate(answer=new_answer(), prompt=event.value, base=base, **values) for base in sampling.bases()]
        turn = Turn(asks)
        self._turns.append(turn)
        self._answers.update({answer.ask.answer: answer for answer in turn.answers})
        transcript = self.query_one("#transcript", VerticalScroll)
        await transcript.mount(turn)
        transcript.anchor()
        while len(self._turns) > TURNS_KEPT:
            oldest = self._turns.pop(0)
            for answer in oldest.answers:
                del self._answers[answer.ask.answer]
            await oldest.remove()
        for ask in asks:
            self._send(ask)

    def on_said_grown(self, event: Said.Grown) -> None:
        event.stop()
        self._fit()

    def on_sampling_done(self, event: Sampling.Done) -> None:
        event.stop()
        self.focus_input()

    def on_weights_choice_chosen(self, event: WeightsChoice.Chosen) -> None:
        event.stop()
        self.focus_input()

    def action_leave(self) -> None:
        """Cancels all that is coming in; otherwise, or the second time, gives the keys back to the screen."""
        coming = [turn for turn in self._turns if not turn.ended and not turn.cancelled]
        for turn in coming:
            turn.cancelled = True
            for answer in turn.answers:
                if not answer.ended:
                    self._send(CancelGeneration(answer=answer.ask.answer))
        if not coming:
            self._typing = False
            self.screen.set_focus(None)

    def on_descendant_focus(self) -> None:
        self._typing = True

    def on_resize(self) -> None:
        self.call_after_refresh(self._fit)
        self.call_after_refresh(self._go_on_typing)

    def _go_on_typing(self) -> None:
        """A window too small for the prompt has taken the focus from it: what is typed now would steer the run."""
        if self._typing and self._prompt.region and self.screen.focused is None:
            self.focus_input()

    def on_key(self, event: Key) -> None:
        transcript = self.query_one("#transcript", VerticalScroll)
        answers: list[VerticalScroll] = [*self._turns[-1].answers] if self._turns else []
        if event.key == "pageup":
            event.stop()
            for part in [answer for answer in answers if answer.scroll_y > 0] or [transcript]:
                part.scroll_page_up()
        elif event.key == "pagedown":
            event.stop()
            for part in [transcript] if transcript.scroll_y < transcript.max_scroll_y else answers:
                part.scroll_page_down()

    def _fit(self) -> None:
        """Has all answers to the newest question in view; those before it are as long as they are."""
        room = self.query_one("#transcript").scrollable_content_region.height
        for turn in self._turns[-2:]:
            turn.fit(room if turn is self._turns[-1] else None)

    def _invite(self) -> None:
        sentence, short = _INVITATIONS.get(self._kind, _CONTINUES)
        for empty in self.query("#empty").results(Static):
            empty.update(
                "The model that is being trained answers with its weights of this moment, or with those that it began"
                f" with; training goes on.\n{sentence}"
            )
        if not self._prompt.disabled:
            self._prompt.placeholder = f"{short}…   {_KEYS}"
