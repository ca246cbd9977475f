"""One line that says what happened last. An alarm stays in it until somebody has read it."""

from __future__ import annotations

from textual.content import Content
from textual.widget import Widget
from textual.widgets import Input

from retention_tui import wording
from retention_tui.progress import Progress, Weight
from retention_tui.theme import FAINT

_COLOURS = {Weight.PLAIN: FAINT, Weight.GOOD: FAINT, Weight.WARNING: "$warning", Weight.CRITICAL: "$error"}


class Happening(Widget):
    """The newest unread alarm, or else the newest entry of the log. A click reads it, like the key `a`."""

    ALLOW_SELECT = False

    def __init__(self, progress: Progress, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self._progress = progress

    def render(self) -> Content:
        unread = self._progress.unread
        entry = unread[-1] if unread else (self._progress.entries[-1] if self._progress.entries else None)
        width = self.content_size.width
        if entry is None or width < 1:
            return Content()
        colour = _COLOURS[entry.weight]
        hint = Content()
        if unread:
            more = f"{len(unread)} alarms  " if len(unread) > 1 else ""
            key = " " if isinstance(self.screen.focused, Input) else "a"  # a letter like any other while one types
            hint = Content.assemble("   ", (more, FAINT), (key, "bold $primary"), (" read", FAINT))
        said = Content.assemble(
            (wording.clock(entry.time), FAINT), "  ", (("▲ " if unread else "") + entry.text, colour)
        )
        said = said.truncate(max(1, width - hint.cell_length), ellipsis=True)
        return said + " " * max(0, width - said.cell_length - hint.cell_length) + hint

    async def on_click(self) -> None:
        if self._progress.unread:
            await self.screen.run_action("read_alarms")
