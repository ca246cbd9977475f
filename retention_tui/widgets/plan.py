"""Memory and time beforehand: a few lines for the launcher, and a page that sets them beside what a run has taken."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Sequence

from textual.app import ComposeResult
from textual.containers import VerticalScroll
from textual.content import Content
from textual.widgets import Static

from retention_tui import wording
from retention_tui.plan_view import NAMES, Table, dot, facts, moment_words, shares, step_words, time_words
from retention_tui.progress import Progress
from retention_tui.theme import FAINT

LEVEL_COLOURS = {"green": "$success", "yellow": "$warning", "red": "$error", "unknown": FAINT}
_LEVEL_WORDS = {"green": "fits", "yellow": "tight", "red": "too large", "unknown": "unknown whether it fits"}
_PARTS = (
    ("loss", "$primary", ("logits_and_loss",)),
    ("activations", "$accent", ("activations", "retention_states")),
    ("weights", "$secondary", ("frozen_weights", "trained_weights", "compute_copies")),
    ("optimizer", "$foreground 65%", ("optimizer_state", "update")),
    ("gradients", "$foreground 45%", ("gradients",)),
    ("rest", "$foreground 25%", ("data", "allocator_cache", "rest_of_process")),
)
"""What the bar shows: a name, a colour and the components that it adds up."""
_MEASURED = {
    "allocator_cache": "cache_memory_bytes",
    "MLX's peak": "peak_memory_bytes",
    "all of the process": "process_memory_bytes",
}
"""The lines of a plan that every step measures, and its metrics; others are told once (`Progress.held_bytes`)."""
_TOTALS = {"MLX's peak": "predicted_peak_bytes", "all of the process": "need_bytes"}
_BAR_WIDTH, _LEGEND_LINES, _SHARE_WIDTH = 60, 2, 40
_AFTERWARDS = ("gradients",)
"""What is measured at the end of a step, and planned for its largest moment: their ratio would say nothing."""
_TOO_LITTLE = 1.1
"""Beyond this times what was predicted, a plan was wrong in the direction that hurts."""
_INDENT = 8
_SHORTEST_WORDS = 24


class PlanSummary(Static):
    """The need as a bar of its parts, the verdict, the time; nothing before there is a plan."""

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self._table: Table | None = None
        self._said = ""

    def show(self, table: Table | None, said: str = "") -> None:
        """Shows a plan, or in its place what is to be said."""
        self._table, self._said = table, said
        self._draw()

    def on_resize(self) -> None:
        self._draw()

    def _draw(self) -> None:
        width = self.content_size.width
        if self._table is not None and width:
            self.update(Content("\n").join(summary(self._table, width)))
        else:
            self.update(Content.styled(self._said, FAINT))


class PlanPage(VerticalScroll):
    """A run's plan, predicted beside measured; the arrow keys and Page Up and Down scroll it."""

    def __init__(self, progress: Progress, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self._progress = progress
        self._table: Table | None = None

    def compose(self) -> ComposeResult:
        yield Static(Content.styled("planning…", FAINT), id="plan-page")

    def take(self, table: Table) -> None:
        """Takes the plan, once it is made."""
        self._table = table
        self.show_progress()

    def say(self, text: str) -> None:
        """Says why there is no plan."""
        self.query_one("#plan-page", Static).update(Content.styled(text, FAINT))

    def show_progress(self) -> None:
        """Sets what the run has taken so far beside the plan."""
        if self._table is not None:
            lines = page(self._table, self._progress, self.scrollable_content_region.width)
            self.query_one("#plan-page", Static).update(Content("\n").join(lines))


def summary(table: Table, width: int) -> list[Content]:
    """The lines of the launcher, for a width in columns."""
    level, bound = table["verdict"], table["tightest"]
    if not table["components"]:
        return [Content.assemble(("memory  ", FAINT), _indented(table["sentence"], width).lstrip())]
    need = _need_of(bound["need_bytes"], bound["limit_bytes"]) if bound else wording.size(table["need_bytes"])
    verdict = (f"{dot(level)} {_LEVEL_WORDS[level]}", LEVEL_COLOURS[level])
    lines = [Content.assemble(("memory  ", FAINT), f"{need}  ", verdict), *_bar(table, width)]
    if level == "yellow" or (level == "red" and not table["suggestions"]):
        lines.append(Content.styled(_indented(table["reason"], width), LEVEL_COLOURS[level]))
    if table["suggestions"]:
        lines.append(Content(_indented(f"fits with {', '.join(table['suggestions'][0]['settings'])}", width)))
    told = [("step", step_words(table)), ("time", time_words(table["time"], measures="m"))]
    if table.get("download_bytes"):
        told.append(("base", f"needs a download of about {wording.size(table['download_bytes'])}"))
    return [*lines, *(Content.assemble((f"{name:<8}", FAINT), _indented(said, width).lstrip()) for name, said in told)]


def page(table: Table, progress: Progress, width: int = 80) -> list[Content]:
    """The lines of a run's page, for a width in columns."""
    metrics, known = progress.metrics, {**progress.metrics, **progress.held_bytes}
    lines = [Content.styled(f"{'':<22}{'predicted':>12}{'measured':>12}", FAINT)]
    for name, said in NAMES.items():
        size, held = table["components"].get(name, 0), known.get(_MEASURED.get(name, name))
        if size or progress.held_bytes.get(name):  # what is there need not be at the largest moment
            row = _row(said, size, held, compared=name not in _AFTERWARDS)
            lines.append(row + _share(name, size, table, width - row.cell_length - 3))
    for name, key in _TOTALS.items():
        lines.append(_row(name, table[key] or 0, metrics.get(_MEASURED[name])))
    planned, rate = table["time"]["seconds_a_step"], metrics.get("steps_per_second")
    said = f"{1 / planned:.3g} it/s" if planned else wording.MISSING
    so_far = f"{rate:.3g} it/s" if rate else wording.MISSING
    lines += [Content.assemble((f"{'speed':<22}", FAINT), f"{said:>12}{so_far:>12}")]
    if table["components"]:
        lines.append(Content.styled(moment_words(table), FAINT))
    lines.append(Content())
    for name, text in facts(table, _time(table["time"], progress)):
        colour = LEVEL_COLOURS[table["verdict"]] if name == "memory" else ""
        lines.append(Content.assemble((f"{name:<14}", FAINT), (text, colour)))
    return [*lines, *_savings(table, width)]


def _savings(table: Table, width: int) -> list[Content]:
    """What each measure that is taken saves of the peak, and what others would."""
    lines = []
    for taken, title in ((True, "what is saved"), (False, "what would be saved")):
        found = [saving for saving in table["savings"] if saving["taken"] is taken and saving["bytes"] > 0]
        found.sort(key=lambda saving: -saving["bytes"])
        for index, saving in enumerate(found):
            heading = "" if index else title
            size = wording.size(saving["bytes"])
            line = Content.assemble((f"{heading:<22}", FAINT), f"{size:>12}   {saving['name']:<24}")
            beside = width - line.cell_length >= _SHORTEST_WORDS  # else what it is about stands below
            left = line.cell_length if beside else line.cell_length - 24
            words = textwrap.wrap(saving["words"], max(_SHORTEST_WORDS, width - left))
            said = f"\n{' ' * left}".join(words if beside else ["", *words])
            lines.append(line + Content.styled(said, FAINT))
    return [Content(), *lines] if lines else []


def _time(planned: Table, progress: Progress) -> str:
    """`about 12 m 04 s left at 4.5 it/s`, as the run itself knows it; empty before its first steps."""
    left, rate = progress.remaining_seconds, progress.metrics.get("steps_per_second")
    if progress.over:
        done, took = progress.ended.step if progress.ended else progress.step, progress.elapsed_seconds
        return f"{done:,} steps are done" + (f", in {wording.duration(took)}" if took else "") if done else ""
    if left is None or not rate:
        return "" if planned["seconds_a_step"] else "the first steps will tell"
    said = f"about {wording.duration(left)} left at {rate:.3g} it/s"
    early = planned["limit"].startswith("by ") and time.time() + left > planned["limit_at"]
    return f"{said}, but it stops {planned['limit'].replace('by', 'at', 1)}" if early else said


def _need_of(need: int, limit: int) -> str:
    """`0.2 of 8.0 GB`, with more decimals where a limit is small."""
    decimals = 1 if limit >= 1e9 else 2
    return f"{need / 1e9:,.{decimals}f} of {limit / 1e9:,.{decimals}f} GB"


def _bar(table: Table, width: int) -> list[Content]:
    """The parts of the need as one bar, largest first, and what its colours mean: as many as two lines hold."""
    parts = [(name, colour, sum(table["components"].get(key, 0) for key in keys)) for name, colour, keys in _PARTS]
    parts = sorted((part for part in parts if part[2]), key=lambda part: -part[2])
    columns = _columns([size for _, _, size in parts], min(_BAR_WIDTH, width))
    bar = Content("").join(Content.styled("█" * count, part[1]) for part, count in zip(parts, columns, strict=True))
    lines, line = [bar], Content()
    for name, colour, size in parts:
        entry = Content.assemble(("■ ", colour), (f"{name} ", FAINT), wording.size(size))
        if line.cell_length and line.cell_length + entry.cell_length + 2 > width:
            lines, line = [*lines, line], Content()
        line = line + "  " + entry if line.cell_length else entry
    return [*lines, line][: 1 + _LEGEND_LINES]


def _columns(sizes: Sequence[int], width: int) -> list[int]:
    """Whole columns in proportion to sizes, that add up to the width: the largest remainders are rounded up."""
    exact = [size * width / sum(sizes) for size in sizes]
    columns = [int(value) for value in exact]
    order = sorted(range(len(sizes)), key=lambda index: columns[index] - exact[index])
    for index in order[: width - sum(columns)]:
        columns[index] += 1
    return columns


def _indented(text: str, width: int) -> str:
    """The text in lines of a width, all under the first one's words."""
    lines, line = list[str](), ""
    for word in text.split():
        if line and len(line) + len(word) + 1 > width - _INDENT:
            lines, line = [*lines, line], ""
        line = f"{line} {word}".lstrip()
    return "\n".join(" " * _INDENT + part for part in [*lines, line])


def _row(name: str, size: int, measured: float | None, *, compared: bool = True) -> Content:
    line = Content.assemble((f"{name:<22}", FAINT), f"{wording.size(size) if size else wording.MISSING:>12}")
    if not measured:
        return line + " " * 20
    ratio = f"{size / measured:>6.2f} ×" if size and compared else ""
    colour = "$warning" if name in _TOTALS and 0 < size * _TOO_LITTLE < measured else FAINT
    return Content.assemble(line, f"{wording.size(measured):>12}", (f"{ratio:<8}", colour))


def _share(name: str, size: int, table: Table, width: int) -> Content:
    """A component as a part of all of them, in its colour."""
    columns = min(_SHARE_WIDTH, width)
    if not size or columns < _SHARE_WIDTH // 2:
        return Content()
    largest = max(size for _, size in shares(table))
    colour = next((colour for _, colour, names in _PARTS if name in names), FAINT)
    return "   " + Content.styled("█" * round(columns * size / largest) or "▏", colour)
