"""What the keys do, and how to read the screen."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import ActiveBinding, BindingType
from textual.containers import VerticalScroll
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Static

_READING = (
    ("━ line", "the course of the steps, smoothed (exponential mean, β = 0.6)"),
    ("▒ band", "the least and the most of the steps under each column: no spike is hidden"),
    ("◆", "loss on the held-out text"),
    ("▼ ▲ ▸", "the loss of late: falling, rising, level"),
    ("▼ ▲ on the axis", "a checkpoint; an alarm"),
    ("▲ line below", "an alarm; it stays until it is read (a)"),
)


class Help(ModalScreen[None]):
    BINDINGS: ClassVar[list[BindingType]] = [("escape,q,question_mark,enter", "dismiss(None)", "Close")]

    def __init__(self, bindings: Iterable[ActiveBinding]) -> None:
        super().__init__()
        self._keys = [
            (item.binding.key_display or item.binding.key, item.binding.tooltip or item.binding.description)
            for item in bindings
            if item.binding.tooltip and not item.binding.system
        ]

    def compose(self) -> ComposeResult:
        with VerticalScroll(id="help"):
            yield Static("Keys", classes="heading")
            yield Static(_table(self._keys))
            yield Static("Reading the screen", classes="heading")
            yield Static(_table(_READING))
            yield Static("Esc closes", classes="heading faint")


def _table(rows: Iterable[tuple[str, str]]) -> Content:
    return Content("\n").join(
        Content.assemble((f"{sign:<17}", "bold $primary"), (about, "$foreground 80%")) for sign, about in rows
    )
