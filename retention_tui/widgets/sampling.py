"""How a chat asks: with which weights, and how tokens are drawn. All of it is seen while one types."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from textual.app import ComposeResult
from textual.containers import Horizontal, HorizontalGroup
from textual.content import Content
from textual.message import Message
from textual.widgets import Button, Input, Static

from retention_tui.theme import FAINT

WEIGHTS = {
    "live": "the weights of this moment",
    "base": "the weights that the run began with",
    "both": "one beside the other",
}
"""Whose answers can be asked for."""


@dataclass(frozen=True, slots=True)
class _Setting:
    """A number that `Generate` takes as `field`; what is typed is brought into its range."""

    field: str
    name: str
    width: int
    start: float
    least: float
    most: float
    whole: bool = False

    def read(self, text: str) -> float:
        """What is typed as a number in the range; what it began with where it is none."""
        try:
            value = float(text)
        except ValueError:
            return self.start
        return min(max(value, self.least), self.most) if math.isfinite(value) else self.start

    def write(self, value: float) -> str:
        return f"{value:.0f}" if self.whole else f"{value:g}"


_SETTINGS = (
    _Setting("temperature", "temperature", 5, 0.7, 0, 100),
    _Setting("top_p", "top-p", 5, 0.9, 0, 1),
    _Setting("max_tokens", "tokens", 6, 256, 1, 99_999, whole=True),
    _Setting("seed", "seed", 5, 0, 0, 9_999, whole=True),
)


class WeightsChoice(HorizontalGroup):
    """Live, base or both: a click chooses, and so does whoever calls `choose`."""

    class Chosen(Message):
        """A click has chosen."""

    def __init__(self) -> None:
        super().__init__()
        self.chosen = "live"

    def compose(self) -> ComposeResult:
        yield Static(Content.styled("weights", FAINT))
        for name, about in WEIGHTS.items():
            button = Button(self._label(name), id=f"weights-{name}", compact=True, tooltip=f"Answer with {about}")
            button.can_focus = False  # a click must not take the cursor away from what is being typed
            yield button

    def choose(self, name: str) -> None:
        """Takes one of `WEIGHTS`."""
        self.chosen = name
        for other in WEIGHTS:
            self.query_one(f"#weights-{other}", Button).label = self._label(other)

    def choose_next(self) -> None:
        names = list(WEIGHTS)
        self.choose(names[(names.index(self.chosen) + 1) % len(names)])

    def on_button_pressed(self, event: Button.Pressed) -> None:
        event.stop()
        self.choose((event.button.id or "").removeprefix("weights-"))
        self.post_message(self.Chosen())

    def _label(self, name: str) -> Content:
        chosen = name == self.chosen
        return Content.assemble(("● " if chosen else "○ ", "$primary" if chosen else FAINT), (name, "not bold"))


class Sampling(Horizontal):
    """Weights, temperature, top-p, how many tokens at most, and the seed; Shift+Tab goes to them, Enter back."""

    class Done(Message):
        """A setting was entered."""

    def compose(self) -> ComposeResult:
        yield WeightsChoice()
        with HorizontalGroup(id="settings"):
            yield Static(Content.styled("Shift+Tab", "bold $primary"))
            for setting in _SETTINGS:
                yield Static(Content.styled(setting.name, FAINT))
                entry = Input(
                    setting.write(setting.start),
                    id=f"set-{setting.field}",
                    compact=True,
                    restrict=r"[0-9]*" if setting.whole else r"[0-9]*\.?[0-9]*",
                    max_length=setting.width - 1,
                )
                entry.styles.width = setting.width
                entry.cursor_blink = False
                yield entry

    @property
    def weights(self) -> WeightsChoice:
        return self.query_one(WeightsChoice)

    def bases(self) -> tuple[bool, ...]:
        """`Generate.base` of each question that is to be asked."""
        return {"live": (False,), "base": (True,), "both": (False, True)}[self.weights.chosen]

    def values(self) -> dict[str, Any]:
        """The settings by the names that `Generate` has for them."""
        values = {setting.field: setting.read(self._entry(setting).value) for setting in _SETTINGS}
        return {**values, **{setting.field: int(values[setting.field]) for setting in _SETTINGS if setting.whole}}

    def on_input_submitted(self, event: Input.Submitted) -> None:
        event.stop()
        self._tidy()
        self.post_message(self.Done())

    def on_descendant_blur(self) -> None:
        self._tidy()

    def _tidy(self) -> None:
        """Shows what is in force."""
        for setting in _SETTINGS:
            entry = self._entry(setting)
            if entry.value != (said := setting.write(setting.read(entry.value))):
                entry.value = said

    def _entry(self, setting: _Setting) -> Input:
        return self.query_one(f"#set-{setting.field}", Input)
