"""The head of a run's screen: is it alive, is it learning, will it fit, when is it done. It stays on every tab."""

from __future__ import annotations

import time
from dataclasses import dataclass

from textual.content import Content
from textual.widget import Widget

from engine.events import Level, State
from retention_tui import wording
from retention_tui.kinds import parameters
from retention_tui.progress import Progress, Trend
from retention_tui.theme import FAINT
from retention_tui.widgets.machine import machine_line, memory_in_short, pressure

STATE_COLOURS = {
    State.LOADING: "$foreground 60%",
    State.TRAINING: "$success",
    State.VALIDATING: "$success",
    State.PAUSED: "$warning",
    State.STOPPING: "$warning",
    State.FINISHED: "$success",
    State.STOPPED: "$foreground 60%",
    State.FAILED: "$error",
}
_TREND_COLOURS = {Trend.FALLING: "$success", Trend.RISING: "$warning", Trend.LEVEL: FAINT, Trend.UNKNOWN: FAINT}
_DOT_WIDTH = len("● validating")


@dataclass(frozen=True, slots=True)
class Figure:
    """A number with its name. `width` is kept free for it, so that its neighbours stay where they are."""

    name: str
    value: Content
    width: int


class RunHeader(Widget):
    """Draws a `Progress` in as many lines as it is given: one to four, more columns where there is room."""

    ALLOW_SELECT = False

    def __init__(self, progress: Progress, run: str, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self._progress = progress
        self._run = run

    def render(self) -> Content:
        width, height = self.content_size
        if width < 1 or height < 1:
            return Content()
        if width < 64:
            lines = self._small(width)
        elif height >= 4:
            lines = [self._title(width), self._bar(width), *(self._loading(width) or self._table(width))]
            if self._watched:
                lines.append(machine_line(self._progress, width))
        else:
            lines = [self._title(width), self._bar(width), self._loading_row(width) or self._row(width)]
        return Content("\n").join(line.truncate(width, ellipsis=True) for line in lines[:height])

    # One line each

    def _small(self, width: int) -> list[Content]:
        progress = self._progress
        step = f"step {progress.step:,}" + (f" of {progress.total_steps:,}" if progress.total_steps else "")
        state = Content.assemble(self._state(), ("  " + self._run, FAINT))
        loss, reading = self._loss(), self._progress.reading
        if reading is not None and reading.level not in (None, Level.GREEN) and not self._progress.over:
            loss += Content("  ") + pressure(reading, with_cause=False)
        if progress.loading:
            return [state, *self._loading(width)[:1], self._bar(width), *self._loading(width)[1:]]
        return [state, Content(step), self._bar(width), loss, self._ends()]

    def _title(self, width: int) -> Content:
        progress, opened = self._progress, self._progress.opened
        total = f"{progress.total_steps:,}"
        step = f"step {progress.step:>{len(total)},} of {total}" if progress.total_steps else ""
        right = Content("   ").join(part for part in (Content(step), self._times(width)) if part)
        state = self._state()
        left = Content.assemble(state, " " * max(1, _DOT_WIDTH + 2 - state.cell_length), (self._run, "bold"))
        if progress.over:
            left += Content.styled(f" · {progress.reason}" if progress.reason else "", FAINT)
            opened = None
        about = [opened.task, parameters(opened.parameters, opened.trained_parameters), opened.device] if opened else []
        for part in about:
            more = left + Content.styled(f" · {part}", FAINT)
            if more.cell_length + right.cell_length + 3 > width:
                break
            left = more
        left = left.truncate(max(1, width - right.cell_length - 2), ellipsis=True)
        return left + " " * (width - left.cell_length - right.cell_length) + right

    def _state(self) -> Content:
        return Content.styled(f"● {self._word}", self._colour)

    @property
    def _word(self) -> str:
        return self._progress.lost or str(self._progress.state)

    @property
    def _colour(self) -> str:
        return "$warning" if self._progress.lost else STATE_COLOURS[self._progress.state]

    def _times(self, width: int) -> Content:
        progress = self._progress
        parts = []
        if progress.elapsed_seconds is not None and width >= 96:
            parts.append(Content.styled(f"{wording.duration(progress.elapsed_seconds)} elapsed", FAINT))
        if progress.remaining_seconds is not None:
            if width >= 96:
                parts.append(Content.styled(f"{wording.duration(progress.remaining_seconds)} left", FAINT))
            parts.append(self._ends())
        return Content.styled(" · ", FAINT).join(parts)

    def _ends(self) -> Content:
        if self._progress.over:
            return Content.styled(self._progress.reason, FAINT)
        remaining = self._progress.remaining_seconds
        if remaining is None:
            return Content()
        if self._progress.state is State.PAUSED:
            return Content.styled("paused", "$warning")
        return Content(f"ends {wording.clock(time.time() + remaining)}")

    def _loading(self, width: int) -> list[Content]:
        """What is being made ready, and how far and how fast; nothing while a run trains."""
        loading = self._progress.loading
        if loading is None:
            return []
        left = loading.seconds_left
        parts = [loading.amount, loading.rate, f"{wording.duration(left)} left" if left is not None else ""]
        if sum(len(part) + 3 for part in parts) > width + 3:
            del parts[1]
        said = Content.styled(" · ", FAINT).join(Content(part) for part in parts if part)
        return [Content.styled(loading.what, "bold").truncate(width, ellipsis=True), said]

    def _loading_row(self, width: int) -> Content:
        """The same in one line."""
        if not self._progress.loading:
            return Content()
        what, said = self._loading(width)
        return what.truncate(max(1, width - said.cell_length - 3), ellipsis=True) + "   " + said

    def _bar(self, width: int) -> Content:
        loading, fraction = self._progress.loading, self._progress.fraction
        if loading is not None:
            fraction = loading.fraction or 0.0
        percent = f" {int(fraction * 100):>3} %"
        room = max(1, width - len(percent))
        halves = round(fraction * room * 2)
        done = "━" * (halves // 2) + ("╸" if halves % 2 else "")
        colour = "$primary" if loading else self._colour if self._progress.step else FAINT
        return Content.assemble((done, colour), ("─" * (room - len(done)), "$foreground 20%"), percent)

    # The numbers

    @property
    def _watched(self) -> bool:
        """True where readings of the machine come; runs of earlier releases have none."""
        return self._progress.reading is not None

    def _loss(self) -> Content:
        trend = self._progress.trend
        loss = wording.number(self._progress.metrics.get("loss"))
        return Content.assemble(("loss ", FAINT), (f"{loss:<6}", "bold"), (trend.value, _TREND_COLOURS[trend]))

    def _figures(self) -> list[Figure]:
        """All numbers, the most telling first."""
        progress = self._progress
        metrics, trend = progress.metrics, progress.trend

        def figure(name: str, text: str, width: int, style: str = "bold") -> Figure:
            return Figure(name, Content.styled(text, style), width)

        loss = Content.assemble(
            (f"{wording.number(metrics.get('loss'))} ", "bold"), (trend.value, _TREND_COLOURS[trend])
        )
        memory = [
            figure("active", wording.size(metrics.get("active_memory_bytes")), 8),
            figure("peak", wording.size(metrics.get("peak_memory_bytes")), 8),
            figure("cache", wording.size(metrics.get("cache_memory_bytes")), 8),
            figure("process", wording.size(metrics.get("process_memory_bytes")), 8),
        ]
        share = metrics.get("real_token_share", 1.0)  # the rest is padding
        real = [figure("real tokens", f"{share:.0%}".replace("%", " %"), 11)] if progress.pads else []
        best = Content.styled(wording.number(progress.best_val_loss), "bold")
        if progress.best_step is not None:
            best += Content.styled(f" at {progress.best_step:,}", FAINT)
        return [
            Figure("loss", loss, 8),
            figure("held-out", wording.number(metrics.get("val_loss")), 8),
            Figure("best", best, 15),
            figure("grad norm", wording.number(metrics.get("grad_norm"), 2), 9),
            figure("learning rate", wording.scientific(metrics.get("learning_rate")), 13),
            figure("it/s", wording.number(metrics.get("steps_per_second"), 2), 5),
            figure("tokens/s", wording.thousands(metrics.get("tokens_per_second")), 8),
            *real,
            *([] if self._watched else memory),  # else the machine's line has them
        ]

    def _table(self, width: int) -> list[Content]:
        """Names above values, in columns that share the width."""
        figures = self._figures()
        while sum(figure.width for figure in figures) + 2 * (len(figures) - 1) > width:
            del figures[2 if len(figures) > 9 else -1]
        spare = width - sum(figure.width for figure in figures)
        gap = min(9, spare // max(1, len(figures) - 1))
        names = [Content.styled(f"{figure.name:<{figure.width}}", FAINT) for figure in figures]
        values = [figure.value.pad_right(max(0, figure.width - figure.value.cell_length)) for figure in figures]
        return [Content(" " * gap).join(names), Content(" " * gap).join(values)]

    def _row(self, width: int) -> Content:
        """Names beside values, as many as fit."""
        short = {"learning rate": "lr", "grad norm": "grad", "best": "", "active": ""}
        narrower = {"held-out": 2, "grad norm": 2, "learning rate": 5}
        line = Content()
        figures = self._figures()
        if self._watched:
            figures.insert(2, Figure("memory", memory_in_short(self._progress), 17))
        for figure in figures:
            name = short.get(figure.name, figure.name)
            if not name:
                continue
            room = figure.width - narrower.get(figure.name, 0)
            value = figure.value.pad_right(max(0, room - figure.value.cell_length))
            unit_after = figure.name in ("it/s", "tokens/s")
            shown = (
                Content.assemble(figure.value.pad_left(max(0, room - figure.value.cell_length)), (f" {name}", FAINT))
                if unit_after
                else Content.assemble((f"{name} ", FAINT), value)
            )
            extra = shown if not line else Content("  ") + shown
            if line.cell_length + extra.cell_length <= width:
                line += extra
        return line
