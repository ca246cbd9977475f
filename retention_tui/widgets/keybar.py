"""The keys of a screen, each a button too."""

from __future__ import annotations

from collections.abc import Iterable

from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import HorizontalGroup
from textual.content import Content
from textual.widgets import Button


class KeyBar(HorizontalGroup):
    """A row of buttons made from bindings; each has the id `key-` and the binding's id, for the style sheet."""

    def __init__(self, bindings: Iterable[Binding]) -> None:
        super().__init__()
        self._bindings_shown = [binding for binding in bindings if binding.show]

    def compose(self) -> ComposeResult:
        for binding in self._bindings_shown:
            action = binding.action if "." in binding.action else f"screen.{binding.action}"
            label = _label(binding, binding.description)
            button = Button(label, action=action, compact=True, id=f"key-{binding.id}", tooltip=binding.tooltip or None)
            button.can_focus = False  # a click must not take the cursor away from what is being typed
            yield button

    def show_state(self, *, renamed: dict[str, str], disabled: set[str], keys_work: bool = True) -> None:
        """Names the keys anew whose ids are in `renamed`, and greys out those in `disabled`.

        With `keys_work` false, while somebody is typing, they are buttons only.
        """
        for binding in self._bindings_shown:
            button = self.query_one(f"#key-{binding.id}", Button)
            label = _label(binding, renamed.get(binding.id or "", binding.description), keys_work)
            if button.label != label:
                button.label = label
            button.disabled = binding.id in disabled


def _label(binding: Binding, description: str, key_works: bool = True) -> Content:
    key = binding.key_display or binding.key
    key = key if key_works else " " * len(key)
    return Content.assemble((key, "bold $primary"), (f" {description}", "not bold"))
