"""Asks for a setting of the running profile that shall change."""

from __future__ import annotations

from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.content import Content
from textual.screen import ModalScreen
from textual.suggester import SuggestFromList
from textual.widgets import Input, Static

from engine.amendments import AMENDABLE
from engine.commands import Set

FIRST = "train.learning_rate"


class SettingQuestion(ModalScreen[Set | None]):
    """One line, KEY=VALUE. What is no key is said at once; what is wrong with a value the run says."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "dismiss(None)", "Cancel", show=False)]

    def compose(self) -> ComposeResult:
        with Vertical(id="question"):
            yield Static(Content("Change a setting, from the next step on"), id="title")
            suggester = SuggestFromList([f"{key}=" for key in AMENDABLE], case_sensitive=False)
            yield Input(f"{FIRST}=", suggester=suggester, select_on_focus=False, compact=True)
            yield Static(Content("Enter changes it, Esc leaves it as it is. Others that can change:"), classes="about")
            others = [key for key in AMENDABLE if key != FIRST]
            yield Static(Content("\n".join(others)), id="others")

    def on_mount(self) -> None:
        self.query_one(Input).action_end()

    def on_input_submitted(self, event: Input.Submitted) -> None:
        event.stop()
        key, separator, value = (part.strip() for part in event.value.partition("="))
        if key in AMENDABLE and separator and value:
            self.dismiss(Set(key, value))
            return
        problem = f"{key!r} cannot be changed while a run trains" if key not in AMENDABLE else f"{key}: to what?"
        self.query_one("#title", Static).update(Content.styled(problem, "$error"))
