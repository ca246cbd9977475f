"""Questions that are asked before a run is stopped or left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Button, Static


@dataclass(frozen=True, slots=True)
class Choice:
    """One way to answer: by its button or its key. `about` says what will happen."""

    id: str
    key: str
    name: str
    about: str


STOP = Choice("stop", "s", "Stop and quit", "write a checkpoint, then end; resuming goes on from there, exactly")
DETACH = Choice("detach", "l", "Leave the screen", "training goes on without it, in this terminal, to its end")
STOP_ONLY = Choice("stop", "s", "Stop", "write a checkpoint, then end; it can be resumed, exactly")
END_LOADING = Choice("stop", "s", "Stop", "end it now; nothing was trained yet, and it can be started again")
CANCEL = Choice("cancel", "Esc", "Cancel", "go back; nothing happens")
WAIT = Choice("cancel", "Esc", "Wait", "the app ends by itself once the checkpoint is written")
LEAVE_NOW = Choice("detach", "l", "Leave the screen now", "the checkpoint is still written, without the screen")


class Question(ModalScreen[str]):
    """Asks for one of a few choices; its result is the choice's id."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("s", "choose('stop')", show=False),
        Binding("l", "choose('detach')", show=False),
        Binding("escape", "choose('cancel')", show=False),
        Binding("up,left", "app.focus_previous", show=False),
        Binding("down,right", "app.focus_next", show=False),
    ]

    def __init__(self, title: str, choices: Sequence[Choice]) -> None:
        super().__init__()
        self._title, self._choices = title, choices

    def compose(self) -> ComposeResult:
        with Vertical(id="question"):
            yield Static(Content(self._title), id="title")
            for choice in self._choices:
                label = Content.assemble((f"{choice.key:<3} ", "bold $primary"), choice.name)
                yield Button(label, id=choice.id, compact=True)
                yield Static(Content(choice.about), classes="about")

    def on_button_pressed(self, event: Button.Pressed) -> None:
        event.stop()
        self.dismiss(event.button.id or "cancel")

    def action_choose(self, choice: str) -> None:
        if any(choice == known.id for known in self._choices):
            self.dismiss(choice)


class QuitQuestion(Question):
    """The run goes on: stop it, leave it alone, or stay. While it is stopping already: wait or leave."""

    def __init__(self, run: str, *, stopping: bool, loading: bool = False) -> None:
        if stopping:
            super().__init__(f"{run} is stopping…", (WAIT, LEAVE_NOW))
        elif loading:
            super().__init__(f"Quit while {run} is loading?", (replace(END_LOADING, name=STOP.name), DETACH, CANCEL))
        else:
            super().__init__(f"Quit while {run} is training?", (STOP, DETACH, CANCEL))


class StopQuestion(Question):
    """Stop the run, or stay; while it is not ready to train there is nothing to save."""

    def __init__(self, run: str, *, loading: bool = False) -> None:
        super().__init__(f"Stop {run}?", (END_LOADING if loading else STOP_ONLY, CANCEL))
