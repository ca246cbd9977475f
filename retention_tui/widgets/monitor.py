"""The charts of a run: a large one, and the others beside it where there is room."""

from __future__ import annotations

from textual.app import ComposeResult
from textual.containers import Container
from textual.content import Content

from retention_tui import wording
from retention_tui.progress import Progress
from retention_tui.theme import FAINT
from retention_tui.widgets.chart import Chart, ChartSpec, Trace

_COLOURS = ("$primary", "$accent", "$secondary", "$foreground 65%")

LOSS = ChartSpec(
    "loss",
    (Trace("loss", "train", smooth=True, band=True), Trace("val_loss", "held-out", marker="◆")),
    log=True,
)
GRAD_NORM = ChartSpec("grad norm", (Trace("grad_norm", "", smooth=True, band=True),), log=True)
SPEED = ChartSpec("it/s", (Trace("steps_per_second", "", smooth=True, band=True),), from_zero=True)
MEMORY = ChartSpec(
    "memory, GB",
    (
        Trace("active_memory_bytes", "active"),
        Trace("peak_memory_bytes", "peak"),
        Trace("process_memory_bytes", "process"),
        Trace("cache_memory_bytes", "cache"),
    ),
    from_zero=True,
    unit=1e9,
)
CHARTS = {"loss": LOSS, "grad-norm": GRAD_NORM, "speed": SPEED, "memory": MEMORY}


class Monitor(Container):
    """Holds the charts. `next_chart` changes which one is large; where there is no room, it is the only one."""

    def __init__(self, progress: Progress, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self._progress = progress
        self._large = "loss"
        self._shown: tuple[object, ...] = ()

    def compose(self) -> ComposeResult:
        for name, spec in CHARTS.items():
            yield Chart(spec, id=name, classes="large" if name == self._large else None)

    def next_chart(self) -> None:
        """Makes the next chart the large one."""
        names = list(CHARTS)
        self.enlarge(names[(names.index(self._large) + 1) % len(names)])

    def enlarge(self, name: str) -> None:
        """Makes this chart the large one; the others keep their order beside it."""
        self._large = name
        order = [name, *(other for other in CHARTS if other != name)]
        self.sort_children(key=lambda chart: order.index(chart.id or name))
        for chart in self.query(Chart):
            chart.set_class(chart.id == name, "large")

    def show_progress(self) -> None:
        """Draws the charts as the run is now; those that cannot be seen, or have not changed, cost nothing."""
        progress = self._progress
        shown = (progress.step, progress.entries_seen, len(progress.marks), id(progress.series), self.size, self._large)
        if shown == self._shown:
            return
        self._shown = shown
        for chart in self.query(Chart):
            chart.show(progress.series, progress.span, progress.marks)
            chart.set_title(self._title(chart))

    def on_chart_selected(self, event: Chart.Selected) -> None:
        event.stop()
        self.enlarge(event.chart.id or "loss")

    def _title(self, chart: Chart) -> Content:
        """A legend in the colours of the lines, with the newest values where there is room for them."""
        spec, metrics = chart.spec, self._progress.metrics
        figures = []
        for trace, colour in zip(spec.traces, _COLOURS, strict=False):
            value = metrics.get(trace.metric)
            said = wording.number(None if value is None else value / spec.unit, 2 if spec.from_zero else 3)
            sign = Content.styled(trace.marker or "━", colour)
            figures.append(Content.assemble(sign, (f" {trace.name}".rstrip(), FAINT), f" {said:<5}"))
        whole = Content("  ").join(figures)
        return whole if whole.cell_length + len(spec.title) + 7 <= chart.size.width else legend(spec)


def legend(spec: ChartSpec) -> Content:
    """The names of a chart's lines, in their colours."""
    return Content(" ").join(
        Content.assemble((trace.marker or "━", colour), (trace.name, FAINT))
        for trace, colour in zip(spec.traces, _COLOURS, strict=False)
    )
