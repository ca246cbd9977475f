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

from engine.amendments import AMENDABLE, Amendments
from engine.commands import Set
from engine.errors import UserError
from engine.profile import Profile
from retention_tui import wording

FIRST = "train.learning_rate"


class SettingQuestion(ModalScreen[Set | None]):
    """One line, KEY=VALUE; what is wrong with it is said at once. `rate` is the present learning rate."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "dismiss(None)", "Cancel", show=False)]

    def __init__(self, profile: Profile, rate: float | None) -> None:
        super().__init__()
        self._profile, self._rate = profile, rate

    def compose(self) -> ComposeResult:
        with Vertical(id="question"):
            yield Static(Content("Change a setting, from the next step on"), id="title")
            suggester = SuggestFromList([f"{key}=" for key in AMENDABLE], case_sensitive=False)
            yield Input(f"{FIRST}=", suggester=suggester, select_on_focus=False, compact=True)
            now = f"The learning rate is {wording.scientific(self._rate)} now; what is set is its schedule's peak."
            yield Static(Content(now), classes="about")
            yield Static(Content("Enter changes it, Esc leaves it as it is. Others that can change:"), classes="about")
            others = [key for key in AMENDABLE if key != FIRST]
            yield Static(Content("\n".join(others)), id="others")

    def on_mount(self) -> None:
        self.query_one(Input).action_end()

    def on_input_submitted(self, event: Input.Submitted) -> None:
        event.stop()
        key, _, value = (part.strip() for part in event.value.partition("="))
        try:
            if not value:
                raise UserError(f"{key or 'a setting'}: to what?")
            Amendments(self._profile, (), lambda entries: None).set(0, key, value)
        except UserError as error:
            self.query_one("#title", Static).update(Content.styled(str(error), "$error"))
        else:
            self.dismiss(Set(key, value))
