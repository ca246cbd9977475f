"""What happened, with the time of day: notices, alarms and changes of state."""

from __future__ import annotations

from rich.style import Style
from rich.table import Table
from rich.text import Text
from textual import events
from textual.color import Color
from textual.widgets import RichLog

from retention_tui import wording
from retention_tui.progress import LOG_ENTRIES, Entry, Progress, Weight

_WRITTEN_AT_ONCE, _BREATH_SECONDS = 50, 0.02
"""Each takes the screen a moment to write: of a long log a piece at a time, with room for keys between."""
_SIGNS = {Weight.WARNING: "▲", Weight.CRITICAL: "▲"}


class EventLog(RichLog):
    """The entries of a `Progress`, newest last; written again when the width has changed."""

    COMPONENT_CLASSES = {f"event-log--{weight.value}" for weight in Weight} | {"event-log--time"}

    def __init__(self, progress: Progress, *, id: str | None = None) -> None:
        super().__init__(id=id, max_lines=4 * LOG_ENTRIES, wrap=True, markup=False, highlight=False, min_width=10)
        self._progress = progress
        self._written = 0
        self._width = 0

    def show_progress(self) -> None:
        """Adds the entries that came since the last call: a piece now and, of many, the rest soon."""
        new = min(self._progress.entries_seen - self._written, len(self._progress.entries))
        if new <= 0:
            return
        # Said, because Rich would take the width of a terminal that it does not see.
        width = self.scrollable_content_region.width or None
        for entry in list(self._progress.entries)[-new:][:_WRITTEN_AT_ONCE]:
            self.write(self._line(entry), width=width)
        left = max(0, new - _WRITTEN_AT_ONCE)
        self._written = self._progress.entries_seen - left
        if left:
            self.set_timer(_BREATH_SECONDS, self.show_progress)

    def on_resize(self, event: events.Resize) -> None:
        if event.size.width not in (0, self._width):
            self._width = event.size.width
            self.rewrite()

    def notify_style_update(self) -> None:
        super().notify_style_update()
        if self._width:
            self.rewrite()

    def rewrite(self) -> None:
        """Writes all entries again."""
        self.clear()
        self._written = 0
        self.show_progress()

    def _line(self, entry: Entry) -> Table:
        """Time, sign and text in columns, so that a long text does not run under the times."""
        line = Table.grid(padding=(0, 1, 0, 0))
        style = self._style(f"event-log--{entry.weight.value}")
        line.add_row(
            Text(wording.clock(entry.time, seconds=True), self._style("event-log--time"), no_wrap=True),
            Text(_SIGNS.get(entry.weight, " "), style),
            Text(entry.text, style),
        )
        return line

    def _style(self, component: str) -> Style:
        _, background = self.background_colors
        colour: Color = background + self.get_component_styles(component).color
        return Style(color=colour.rich_color)
