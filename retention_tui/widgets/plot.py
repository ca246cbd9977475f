"""Lines and points on a grid of characters, drawn by plotext, without axes or colours of their own."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import plotext
from numpy.typing import NDArray

from retention_tui.history import Floats

_ESCAPE = re.compile("\x1b\\[([0-9;]*)m")
_FOREGROUND = "38;5;"

plotext.terminal.limit(False, False)  # a plot is as large as its widget, not as the terminal was at the start


@dataclass(frozen=True, slots=True)
class Curve:
    """Points to draw: `x` and `y` of shape [n], finite; joined by a line of braille dots, or each shown as `marker`."""

    x: Floats
    y: Floats
    marker: str | None = None


@dataclass(frozen=True, slots=True)
class Raster:
    """What was drawn: characters, and for each the curve it belongs to (−1 for none); both of shape [height, width]."""

    glyphs: NDArray[np.str_]
    curves: NDArray[np.int8]


def rasterize(
    curves: Sequence[Curve], x_limits: tuple[float, float], y_limits: tuple[float, float], width: int, height: int
) -> Raster:
    """Draws up to 15 curves, later ones above earlier ones; the limits are the outer edges of the grid."""
    figure = plotext.figure
    figure.clear.data()
    figure.clear.settings()
    figure.plot_size(width, height)
    figure.canvas("default")
    figure.axes(False)
    every_ruler = figure.ruler("both", "both")
    every_ruler.frequency(0)
    every_ruler.alignment(lim="edge")
    figure.ruler("x").lim(*x_limits)
    figure.ruler("y").lim(*y_limits)
    for index, curve in enumerate(curves):
        if not curve.x.size:
            continue
        marker = plotext.marker(curve.marker or "braille", index + 1)
        signal = figure.signal(curve.x.tolist(), curve.y.tolist(), marker=marker)
        figure.draw(signal if curve.marker else signal.lines(True))
    return _parse(figure.build().string(), width, height)


def _parse(drawn: str, width: int, height: int) -> Raster:
    glyphs = np.full((height, width), " ", dtype="<U1")
    curves = np.full((height, width), -1, dtype=np.int8)
    for row, line in enumerate(drawn.split("\n")[:height]):
        column, curve = 0, -1
        for position, part in enumerate(_ESCAPE.split(line)):
            if position % 2:
                curve = int(part.removeprefix(_FOREGROUND)) - 1 if part.startswith(_FOREGROUND) else curve
                curve = -1 if part in ("", "0") else curve
                continue
            end = min(width, column + len(part))
            glyphs[row, column:end] = list(part[: end - column])
            curves[row, column:end] = curve
            column = end
    curves[(glyphs == " ") | (glyphs == "\u2800")] = -1
    return Raster(glyphs, curves)
