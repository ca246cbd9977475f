"""A chart of one or more series over the steps of a run.

plotext draws lines and points; this widget puts them on axes with labels of a steady width, and under them the band
between the least and the most of the steps of each column. A drawing is made only when the widget is shown.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from rich.segment import Segment
from rich.style import Style
from textual.color import Color
from textual.content import Content
from textual.geometry import Size
from textual.message import Message
from textual.strip import Strip
from textual.widget import Widget

from retention_tui.history import Columns, Floats, Series
from retention_tui.marks import Mark, MarkKind
from retention_tui.widgets.plot import Curve, rasterize
from retention_tui.widgets.scale import Scale, fit, plain_label, step_label

SERIES_STYLES = ("chart--first", "chart--second", "chart--third", "chart--fourth")
_EIGHTHS = np.array(list(" ▁▂▃▄▅▆▇█"))
_LABEL_WIDTH = 6
_LARGEST = 1e100  # an axis counts no further; what lies beyond is drawn at its edge
_AXES_FROM = Size(28, 4)  # below this size the curves get all of the place
_BAND = len(SERIES_STYLES)
_LABEL, _AXIS, _BELOW, _CHECKPOINT, _WARNING, _CRITICAL = range(_BAND + 1, _BAND + 7)
_SIGNS = {
    MarkKind.CHECKPOINT: ("▼", _CHECKPOINT),
    MarkKind.WARNING: ("▲", _WARNING),
    MarkKind.CRITICAL: ("▲", _CRITICAL),
}
_CHECKPOINTS_APART = 4  # columns; nearer ones are left out, as they tell nothing that their neighbours do not
_MOST_LINES = 8  # alarms that are marked with a line up the chart; more of them would hide it


@dataclass(frozen=True, slots=True)
class Trace:
    """One metric in a chart, in the colour of its place among the traces; `name` is what the legend calls it."""

    metric: str
    name: str
    smooth: bool = False
    band: bool = False
    marker: str | None = None


@dataclass(frozen=True, slots=True)
class ChartSpec:
    """What a chart shows and how its vertical axis counts (in `unit` of the metric's own unit)."""

    title: str
    traces: tuple[Trace, ...]
    log: bool = False
    from_zero: bool = False
    unit: float = 1.0


@dataclass(frozen=True, slots=True)
class Grid:
    """What is in each cell: a character, its colour's index, and 1 where the band is behind it; [height, width]."""

    glyphs: NDArray[np.str_]
    colours: NDArray[np.int16]
    backgrounds: NDArray[np.int16]

    @classmethod
    def blank(cls, width: int, height: int) -> Grid:
        shape = (height, width)
        return cls(np.full(shape, " ", "<U1"), np.full(shape, _LABEL, np.int16), np.zeros(shape, np.int16))

    def part(self, rows: slice, columns: slice) -> Grid:
        """A view of some cells: what is drawn there is drawn here."""
        return Grid(self.glyphs[rows, columns], self.colours[rows, columns], self.backgrounds[rows, columns])

    def write(self, row: int, column: int, text: str) -> None:
        self.glyphs[row, column : column + len(text)] = list(text)


class Chart(Widget):
    """Draws the series that it was shown last, whenever it is visible, resized or its theme changes."""

    COMPONENT_CLASSES = {
        *SERIES_STYLES,
        *("chart--label", "chart--axis", "chart--message"),
        *("chart--checkpoint", "chart--warning", "chart--critical"),
    }
    ALLOW_SELECT = False

    class Selected(Message):
        """The chart was clicked."""

        def __init__(self, chart: Chart) -> None:
            super().__init__()
            self.chart = chart

        @property
        def control(self) -> Chart:
            return self.chart

    def __init__(self, spec: ChartSpec, *, id: str | None = None, classes: str | None = None) -> None:
        super().__init__(id=id, classes=classes)
        self.spec = spec
        self._series: Mapping[str, Series] = {}
        self._span = (0.0, 1.0)
        self._marks: list[Mark] = []
        self._strips: list[Strip] | None = None
        self._drawn_size = Size(0, 0)

    def show(self, series: Mapping[str, Series], span: tuple[float, float], marks: Iterable[Mark] = ()) -> None:
        """Shows the series between two steps, and what happened there; called again when they have grown."""
        self._series, self._span, self._marks = series, span, list(marks)
        self._redraw()

    def set_title(self, values: Content) -> None:
        """The chart's name with its newest values, above it."""
        self.border_title = Content.assemble((f"{self.spec.title}  ", "bold"), values)

    def on_click(self) -> None:
        self.post_message(self.Selected(self))

    def notify_style_update(self) -> None:
        super().notify_style_update()
        self._strips = None

    def render_line(self, y: int) -> Strip:
        if self._strips is None or self._drawn_size != self.size:
            self._drawn_size = self.size
            self._strips = self._draw(self.size.width, self.size.height)
        return self._strips[y] if y < len(self._strips) else Strip.blank(self.size.width, self.rich_style)

    def _redraw(self) -> None:
        self._strips = None
        self.refresh()

    def _draw(self, width: int, height: int) -> list[Strip]:
        if width < 2 or height < 1:
            return []
        with_axes = width >= _AXES_FROM.width and height >= _AXES_FROM.height
        left, below = (_LABEL_WIDTH + 1, 2) if with_axes else (0, 0)
        canvas_width, canvas_height = width - left - (1 if with_axes else 0), height - below
        reduced = [
            self._series[trace.metric].columns(*self._span, canvas_width) if trace.metric in self._series else None
            for trace in self.spec.traces
        ]
        scale = self._scale(reduced)
        if scale is None:
            return self._message("waiting for the first step", width, height)
        grid = Grid.blank(width, height)
        canvas = grid.part(slice(0, canvas_height), slice(left, left + canvas_width))
        self._draw_band(reduced, scale, canvas)
        self._draw_curves(reduced, scale, canvas)
        if with_axes:
            self._draw_axes(scale, grid, left, canvas_width, canvas_height)
            self._draw_marks(grid.part(slice(0, canvas_height + 1), slice(left, left + canvas_width)))
        return self._strip_rows(grid)

    def _scale(self, reduced: list[Columns | None]) -> Scale | None:
        """The vertical axis around everything that is drawn; None while there is nothing."""
        parts = []
        for trace, columns in zip(self.spec.traces, reduced, strict=True):
            if columns is not None:
                parts += [columns.low, columns.high] if trace.band or trace.marker else [self._course(trace, columns)]
        values = np.concatenate([np.empty(0), *parts]) / self.spec.unit
        values = values[np.isfinite(values) & ((values > 0) | (not self.spec.log))]
        if not values.size:
            return None
        values = np.clip(values, -_LARGEST, _LARGEST)
        return fit(float(values.min()), float(values.max()), log=self.spec.log, from_zero=self.spec.from_zero)

    @staticmethod
    def _course(trace: Trace, columns: Columns) -> Floats:
        return columns.smooth if trace.smooth else columns.mean

    def _draw_band(self, reduced: list[Columns | None], scale: Scale, canvas: Grid) -> None:
        """Fills cells between low and high; its edges fall on eighths of a cell."""
        height = len(canvas.glyphs)
        for trace, columns in zip(self.spec.traces, reduced, strict=True):
            known = np.flatnonzero(np.isfinite(columns.low)) if trace.band and columns else np.empty(0)
            if columns is None or not known.size:
                continue
            inside = np.arange(known[0], known[-1] + 1)
            low, high = (
                np.nan_to_num(scale.place(np.interp(inside, known, edge[known]) / self.spec.unit)) * height * 8
                for edge in (columns.low, columns.high)
            )
            bottom = np.clip(np.floor(low), 0, height * 8).astype(int)
            top = np.clip(np.maximum(np.ceil(high), bottom + 1), 0, height * 8).astype(int)
            for row in range(height):
                base = (height - 1 - row) * 8
                upper, lower = np.clip(top - base, 0, 8), np.clip(bottom - base, 0, 8)
                canvas.backgrounds[row, inside[(upper == 8) & (lower < 8)]] = 1
                crest = (upper < 8) & (upper > lower)
                canvas.glyphs[row, inside[crest]] = _EIGHTHS[upper[crest]]
                canvas.colours[row, inside[crest]] = _BAND
                foot = (upper == 8) & (lower > 0) & (lower < 8)
                canvas.glyphs[row, inside[foot]] = _EIGHTHS[lower[foot]]
                canvas.colours[row, inside[foot]] = _BELOW

    def _draw_curves(self, reduced: list[Columns | None], scale: Scale, canvas: Grid) -> None:
        height, width = canvas.glyphs.shape
        start, stop = self._span
        curves = []
        for trace, columns in zip(self.spec.traces, reduced, strict=True):
            if columns is None:
                curves.append(Curve(np.empty(0), np.empty(0)))
                continue
            x = (columns.step - start) / (stop - start) * width
            y = scale.place(self._course(trace, columns) / self.spec.unit) * height
            known = np.isfinite(x) & np.isfinite(y)
            curves.append(Curve(np.clip(x[known], 0, width - 0.01), np.clip(y[known], 0, height - 0.01), trace.marker))
        raster = rasterize(curves, (0.0, float(width)), (0.0, float(height)), width, height)
        drawn = raster.curves >= 0
        canvas.backgrounds[drawn & (canvas.colours == _BAND)] = 1
        canvas.glyphs[drawn], canvas.colours[drawn] = raster.glyphs[drawn], raster.curves[drawn]

    def _draw_axes(self, scale: Scale, grid: Grid, left: int, width: int, height: int) -> None:
        grid.colours[: height + 1, left - 1] = _AXIS
        grid.colours[height, left - 1 : left + width] = _AXIS
        grid.glyphs[:height, left - 1] = "│"
        grid.write(height, left - 1, "└" + "─" * width)
        ticks, rows = self._rows(scale, height)
        distance = min((after - before for before, after in pairwise(ticks)), default=abs(ticks[0]) if ticks else 1.0)
        for value, row in zip(ticks, rows, strict=True):
            label = plain_label(value, distance or 1.0)[-_LABEL_WIDTH + 1 :]
            grid.write(row, left - 2 - len(label), label)
            grid.write(row, left - 1, "┤")
        self._draw_steps(grid, left, width, height)

    @staticmethod
    def _rows(scale: Scale, height: int) -> tuple[list[float], list[int]]:
        """Values to label and their rows: as many as leave a row free between any two."""
        for count in range(max(1, min(6, (height + 1) // 2)), 0, -1):
            ticks = scale.ticks(count)
            rows = [height - 1 - min(height - 1, max(0, int(place * height))) for place in scale.place(np.array(ticks))]
            if all(lower - upper > 1 for lower, upper in pairwise(rows)):
                return ticks, rows
        return ticks[:1], rows[:1]

    def _draw_steps(self, grid: Grid, left: int, width: int, height: int) -> None:
        start, stop = self._span
        ticks = Scale(start, stop).ticks(max(1, width // 16))
        distance = ticks[1] - ticks[0] if len(ticks) > 1 else 1.0
        free = left - 1
        for value in ticks:
            column = left + min(width - 1, int((value - start) / (stop - start) * width))
            label = step_label(value, distance)
            begin = min(max(column - len(label) // 2, left - 1), left + width + 1 - len(label))
            if begin >= free and value == int(value):
                grid.write(height, column, "┬")
                grid.write(height + 1, begin, label)
                free = begin + len(label) + 2

    def _draw_marks(self, grid: Grid) -> None:
        """Signs on the axis, the grid's lowest row, and up from those of alarms a line where nothing else is."""
        height, width = grid.glyphs.shape
        start, stop = self._span
        places: dict[MarkKind, set[int]] = {kind: set() for kind in MarkKind}
        for mark in self._marks:
            if start <= mark.step <= stop:
                places[mark.kind].add(min(width - 1, int((mark.step - start) / (stop - start) * width)))
        alarms = places[MarkKind.WARNING] | places[MarkKind.CRITICAL]
        for column in alarms if len(alarms) <= _MOST_LINES else ():
            blank = np.flatnonzero(grid.glyphs[: height - 1, column] == " ")
            blank = blank[grid.backgrounds[blank, column] == 0]
            grid.glyphs[blank, column], grid.colours[blank, column] = "┊", _AXIS
        places[MarkKind.CHECKPOINT] = _apart(places[MarkKind.CHECKPOINT])
        for kind in MarkKind:  # the gravest last
            sign, colour = _SIGNS[kind]
            for column in places[kind]:
                grid.glyphs[height - 1, column], grid.colours[height - 1, column] = sign, colour

    def _strip_rows(self, grid: Grid) -> list[Strip]:
        """Runs of equal style become segments."""
        styles = self._styles()
        strips = []
        for characters, row in zip(grid.glyphs, grid.colours * 2 + grid.backgrounds, strict=True):
            text = "".join(characters.tolist())
            edges = [0, *(np.flatnonzero(np.diff(row)) + 1).tolist(), len(text)]
            segments = [Segment(text[begin:end], styles[int(row[begin])]) for begin, end in pairwise(edges)]
            strips.append(Strip(segments, len(text)))
        return strips

    def _styles(self) -> dict[int, Style]:
        """Rich styles by twice the colour's index plus one on the band."""
        _, background = self.background_colors
        first = self.get_component_styles(SERIES_STYLES[0]).color
        band = background.blend(first, 0.28 if self.app.current_theme.dark else 0.22, 1.0)
        named = {name: background + self.get_component_styles(name).color for name in sorted(self.COMPONENT_CLASSES)}
        colours = [
            *(named[name] for name in SERIES_STYLES),
            band,
            named["chart--label"],
            named["chart--axis"],
            background,
            named["chart--checkpoint"],
            named["chart--warning"],
            named["chart--critical"],
        ]
        return {
            index * 2 + on_band: _style(colour, behind)
            for index, colour in enumerate(colours)
            for on_band, behind in enumerate((background, band))
        }

    def _message(self, text: str, width: int, height: int) -> list[Strip]:
        _, background = self.background_colors
        style = _style(background + self.get_component_styles("chart--message").color, background)
        blank = Strip([Segment(" " * width, style)], width)
        line = Strip([Segment(text[:width].center(width), style)], width)
        return [line if row == height // 2 else blank for row in range(height)]


def _apart(columns: set[int]) -> set[int]:
    """Columns far enough from each other to be told apart, the last one among them."""
    kept: list[int] = []
    for column in sorted(columns, reverse=True):
        if not kept or kept[-1] - column >= _CHECKPOINTS_APART:
            kept.append(column)
    return set(kept)


def _style(colour: Color, background: Color) -> Style:
    return Style(color=colour.rich_color, bgcolor=background.rich_color)
