"""What happened while nobody was here: a heading, and a line for each of as many runs as there is room for."""

from __future__ import annotations

from collections.abc import Sequence

from textual.content import Content
from textual.events import Resize
from textual.widgets import Static

from retention_tui import wording
from retention_tui.progress import Weight
from retention_tui.story import News
from retention_tui.theme import FAINT

_COLOURS = {
    Weight.PLAIN: "$foreground",
    Weight.GOOD: "$foreground",
    Weight.WARNING: "$warning",
    Weight.CRITICAL: "$error",
}


class WhileAway(Static):
    """Shows itself only where there is news."""

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.display = False
        self._news: Sequence[News] = ()

    def show(self, news: Sequence[News]) -> None:
        """Takes all the news that nobody has dismissed, the gravest first."""
        if news != self._news:
            self._news = news
            self.display = bool(news)
            self._write()

    def on_resize(self, _: Resize) -> None:
        self._write()

    def _write(self) -> None:
        if not self._news:
            return
        width, height = self.screen.size.width - 4, self.screen.size.height
        room = min(4, max(2, height // 8))
        shown = self._news[: room - (len(self._news) > room)]
        clocks = [wording.clock(item.time) for item in shown]
        column = max(len(clock) for clock in clocks)
        lines = [
            Content.assemble((f"{clock:>{column}}  ", FAINT), (item.text, _COLOURS[item.weight]))
            for clock, item in zip(clocks, shown, strict=True)
        ]
        if len(shown) < len(self._news):
            lines.append(Content.styled(f"and {len(self._news) - len(shown)} more runs", FAINT))
        hint = Content.assemble(("Esc", "bold $primary"), (" dismiss", FAINT))
        heading = Content.styled("While you were away", "bold")
        lines.insert(0, heading + " " * max(1, width - heading.cell_length - hint.cell_length) + hint)
        self.update(Content("\n").join(line.truncate(max(1, width), ellipsis=True) for line in lines))
