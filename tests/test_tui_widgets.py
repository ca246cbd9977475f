"""What the screen draws of a run: histories reduced without losing anything, charts, words and the state of a run."""

from __future__ import annotations

import dataclasses
import math
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from textual.app import App, ComposeResult
from textual.pilot import Pilot
from textual.strip import Strip
from textual.widgets import Static

from engine.commands import Command, Generate
from engine.events import (
    Alarm,
    AnswerEnded,
    AnswerStarted,
    AnswerText,
    CheckpointSaved,
    Level,
    Reading,
    RunEnded,
    RunOpened,
    State,
    StateChanged,
    StepCompleted,
    Validated,
)
from engine.lines import LineWriter
from engine.runs import create_run
from engine.store_writer import StoreWriter
from engine.watchers import Present
from retention_tui import wording
from retention_tui.history import Series, Smoother
from retention_tui.marks import Mark, MarkKind, load_marks
from retention_tui.progress import Progress, empty_history
from retention_tui.widgets.chart import Chart, ChartSpec, Trace
from retention_tui.widgets.chat import Chat
from retention_tui.widgets.log import EventLog
from retention_tui.widgets.machine import machine_line
from retention_tui.widgets.monitor import CHARTS
from retention_tui.widgets.scale import fit

anything = st.floats(allow_nan=True, allow_infinity=True, width=32)
columns = ("step", "low", "high", "mean", "smooth")


def series_of(values: list[float], capacity: int = 16) -> Series:
    series = Series(capacity=capacity)
    for step, value in enumerate(values, 1):
        series.add(step, value)
    return series


@given(st.lists(anything, min_size=1, max_size=400), st.integers(1, 60))
def test_a_reduced_history_keeps_every_spike(values: list[float], count: int) -> None:
    series = series_of(values)
    assert len(series) <= 16
    finite = [value for value in values if math.isfinite(value)]
    reduced = series.columns(0, len(values) + 1, count)
    if not finite:
        assert np.isnan(reduced.low).all()
        return
    assert np.nanmin(reduced.low) == min(finite)
    assert np.nanmax(reduced.high) == max(finite)
    known = np.isfinite(reduced.low)
    slack = 1e-9 * max(map(abs, finite))
    assert (reduced.low[known] <= reduced.mean[known] + slack).all()
    assert (reduced.mean[known] <= reduced.high[known] + slack).all()


@given(st.lists(anything, max_size=700))
@settings(max_examples=50)
def test_a_history_read_at_once_is_that_of_its_steps_one_by_one(values: list[float]) -> None:
    steps = np.arange(1, len(values) + 1)
    at_once, one_by_one = Series.of(steps, np.array(values), capacity=16), series_of(values)
    for _ in range(2):
        assert len(at_once) == len(one_by_one)
        mine, theirs = (series.columns(0, len(values) + 2, 50) for series in (at_once, one_by_one))
        size = max((abs(value) for value in values if math.isfinite(value)), default=1.0)
        for name in columns:
            np.testing.assert_allclose(getattr(mine, name), getattr(theirs, name), rtol=1e-9, atol=1e-9 * size)
        at_once.add(len(values) + 1, 1.0)  # and it goes on in the same way
        one_by_one.add(len(values) + 1, 1.0)


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=300))
def test_smoothing_is_the_weighted_mean_of_its_definition(values: list[float]) -> None:
    weights = 0.8 ** np.arange(len(values))[::-1]
    expected = float(np.dot(weights, values) / weights.sum())
    assert Smoother(0.8).add_many(np.array(values))[-1] == pytest.approx(expected, rel=1e-9, abs=1e-6)


def test_a_run_that_went_back_draws_its_steps_once() -> None:
    series = series_of([5.0, 4.0, 9.0, 9.0])
    series.add(3, 3.0)
    reduced = series.columns(0, 5, 5)
    assert np.nanmax(reduced.high) == 5.0
    assert series.last_step == 3


class OneChart(App[None]):
    def __init__(self, spec: ChartSpec) -> None:
        super().__init__()
        self.chart = Chart(spec)

    def compose(self) -> ComposeResult:
        yield self.chart

    def drawn(self) -> list[str]:
        lines: list[Strip] = [self.chart.render_line(y) for y in range(self.chart.size.height)]
        return [line.text for line in lines]


NOTHING = math.nan
COURSES = {
    "no value at all": [NOTHING] * 5,
    "nothing but infinities": [math.inf, -math.inf],
    "one value": [2.5],
    "always the same": [3.0] * 50,
    "zeros": [0.0] * 20,
    "below zero on a logarithm": [-1.0, -2.0, 3.0],
    "a hole of NaN": [4.0] * 20 + [NOTHING] * 20 + [2.0] * 20,
    "a spike of many powers": [1e-30, 1e30, 1.0],
    "huge": [1e300, 1.7e308],
}


@pytest.mark.parametrize("values", COURSES.values(), ids=COURSES)
async def test_charts_draw_whatever_a_run_may_measure(values: list[float]) -> None:
    app = OneChart(CHARTS["loss"])
    async with app.run_test(size=(60, 14)) as pilot:
        for size in ((9, 3), (1, 1), (200, 50), (60, 14)):
            await pilot.resize_terminal(*size)
            for name, spec in CHARTS.items():
                app.chart.spec = spec
                app.chart.show({trace.metric: series_of(values) for trace in spec.traces}, (0.0, len(values) + 1.0))
                lines = app.drawn()
                assert all(len(line) == app.chart.size.width for line in lines), name
                usable = [value for value in values if math.isfinite(value) and (value > 0 or not spec.log)]
                if size == (60, 14):
                    assert any("waiting for the first step" in line for line in lines) == (not usable), name


async def test_a_chart_puts_values_where_its_axis_says() -> None:
    spec = ChartSpec("rising", (Trace("rising", "", band=True),))
    app = OneChart(spec)
    async with app.run_test(size=(80, 24)):
        app.chart.show({"rising": series_of([float(step) for step in range(1, 101)], 1024)}, (0.0, 100.0))
        lines = app.drawn()
    drawn = [line.split("│")[-1].split("┤")[-1] for line in lines[:-2]]
    ends = [len(line.rstrip()) for line in drawn if line.strip()]
    assert len(ends) > 15
    assert ends == sorted(ends, reverse=True), "a line that rises ends further right in each row above"
    labels = [int(line.split("┤")[0]) for line in lines if "┤" in line]
    assert labels == sorted(labels, reverse=True)
    assert [int(word) for word in lines[-1].split()] == [0, 25, 50, 75, 100]


async def test_checkpoints_and_alarms_are_marked_where_they_happened() -> None:
    spec = ChartSpec("falling", (Trace("falling", "", smooth=True),))
    app = OneChart(spec)
    series = {"falling": series_of([200.0 - step for step in range(1, 101)], 1024)}
    marks = [
        *(Mark(step, MarkKind.CHECKPOINT) for step in range(0, 101, 10)),
        Mark(50, MarkKind.WARNING),
        Mark(75, MarkKind.CRITICAL),
        Mark(2000, MarkKind.CRITICAL),  # of steps that are not shown
    ]
    async with app.run_test(size=(120, 24)):
        app.chart.show(series, (0.0, 100.0), marks)
        *canvas, axis, _ = app.drawn()
        app.chart.show(series, (0.0, 100.0))
        *bare, plain_axis, _ = app.drawn()
    left, width = axis.index("└") + 1, len(axis.rstrip()) - axis.index("└") - 1

    def columns(sign: str) -> list[int]:
        return [round((index - left) / width * 100) for index, found in enumerate(axis) if found == sign]

    assert columns("▲") == pytest.approx([50, 75], abs=1)
    assert columns("▼") == pytest.approx([0, 10, 20, 30, 40, 60, 70, 80, 90, 100], abs=1)
    lines = {index for row in canvas for index, found in enumerate(row) if found == "┊"}
    assert lines == {index for index, found in enumerate(axis) if found == "▲"}
    assert not set("▲▼") & set(plain_axis) and not any("┊" in row for row in bare)
    assert [row.replace("┊", " ") for row in canvas] == bare  # no value is hidden


async def test_many_marks_never_hide_the_axis() -> None:
    app = OneChart(CHARTS["loss"])
    marks = [Mark(step, kind) for step in range(1000) for kind in (MarkKind.CHECKPOINT, MarkKind.WARNING)]
    async with app.run_test(size=(80, 20)) as pilot:
        for size in ((80, 20), (30, 6), (9, 3), (1, 1)):
            await pilot.resize_terminal(*size)
            app.chart.show({"loss": series_of([2.0] * 1000), "val_loss": series_of([2.0])}, (0.0, 1000.0), marks)
            assert not any("┊" in line for line in app.drawn())
            checkpoints = marks[::2]
            app.chart.show({"loss": series_of([2.0] * 1000)}, (0.0, 1000.0), checkpoints)
            assert max((line.count("▼") for line in app.drawn()), default=0) <= size[0] // 4 + 1


LEVELS = {Level.GREEN: "normal", Level.YELLOW: "warning", Level.RED: "critical"}
readings = st.builds(
    Reading,
    level=st.none() | st.sampled_from(Level),
    cause=st.text("ab \n\t\x1b", max_size=40),
    limit_bytes=st.none() | st.integers(0, 10**13),
    available_bytes=st.none() | st.integers(0, 10**13),
    swap_bytes=st.none() | st.integers(0, 10**12),
    gpu_bytes=st.none() | st.integers(0, 10**12),
    gpu_limit_bytes=st.none() | st.integers(0, 10**12),
    heat=st.none() | st.sampled_from(["nominal", "fair", "serious", "critical", "lukewarm"]),
    on_mains=st.none() | st.booleans(),
    battery_percent=st.none() | st.floats(0, 100),
    lid_closed=st.none() | st.booleans(),
)


@given(readings, st.integers(64, 240), st.none() | st.floats(0, 1e13))
def test_the_machine_in_one_line(reading: Reading, width: int, process: float | None) -> None:
    progress = Progress()
    progress.apply(reading)
    if process is not None:
        progress.metrics["process_memory_bytes"] = process
    line = machine_line(progress, width).plain
    assert "\n" not in line
    assert ("pressure –" in line) == (reading.level is None)
    if reading.level is not None:
        assert f"● {LEVELS[reading.level]}" in line
    if width >= 200:
        assert ("power –" in line) == (reading.on_mains is None)
        assert ("heat –" in line) == (reading.heat in (None, "lukewarm"))
    assert "0.00 active" not in line and "– active" in line  # unknown is unknown, never zero


def test_nothing_is_said_of_the_machine_once_the_run_is_over() -> None:
    progress = Progress()
    progress.apply(Reading(level=Level.RED, limit_bytes=10**9, on_mains=True))
    assert "critical" in machine_line(progress, 130).plain
    progress.apply(RunEnded(state=State.STOPPED, reason="", exit_code=3, step=7))
    assert "critical" not in machine_line(progress, 130).plain


@given(st.floats(1e-12, 1e12), st.floats(1e-12, 1e12), st.booleans(), st.booleans())
def test_an_axis_holds_its_values_and_its_labels(one: float, other: float, log: bool, from_zero: bool) -> None:
    low, high = sorted((one, other))
    scale = fit(low, high, log=log, from_zero=from_zero)
    places = scale.place(np.array([low, high]))
    assert (places >= -1e-9).all() and (places <= 1 + 1e-9).all()
    ticks = scale.ticks(5)
    assert len(ticks) <= 7
    assert all(-1e-6 <= place <= 1 + 1e-6 for place in scale.place(np.array(ticks)))


def step(number: int, **metrics: float) -> StepCompleted:
    return StepCompleted(step=number, total_steps=100, metrics=metrics, elapsed_seconds=1.0, remaining_seconds=9.0)


def opened(at_step: int) -> RunOpened:
    return RunOpened(
        run="r", directory="runs/r", task="retention-lm", device="cpu", dtype="float32", parameters=1,
        step=at_step, total_steps=100, attempt=2,
    )  # fmt: skip


def test_steps_that_come_before_the_history_is_read_are_drawn_after_it() -> None:
    progress = Progress()
    for event in (opened(10), step(11, loss=2.0), step(12, loss=1.5)):
        progress.apply(event)
    history = empty_history()
    for number in range(1, 11):
        history["loss"].add(number, 10.0 - number / 2)
    progress.adopt_history(history)
    reduced = progress.series["loss"].columns(0, 20, 20)
    np.testing.assert_array_equal(reduced.mean[1:13], [*(10.0 - n / 2 for n in range(1, 11)), 2.0, 1.5])
    assert progress.step == 12


def test_what_a_run_left_behind_when_it_went_back_is_forgotten() -> None:
    progress = Progress()
    for event in (
        opened(0),
        CheckpointSaved(step=40, path="step-40", size_bytes=1, seconds=0.1),
        Validated(step=80, metrics={"val_loss": 1.0}, best=True),
        CheckpointSaved(step=80, path="step-80", size_bytes=1, seconds=0.1),
        step(90, loss=9.0),
        Alarm(level="warning", text="it diverges"),
        opened(60),
    ):
        progress.apply(event)
    assert progress.best_val_loss is None and progress.best_step is None
    assert "val_loss" not in progress.metrics
    assert list(progress.marks) == [Mark(40, MarkKind.CHECKPOINT), Mark(60, MarkKind.WARNING)]
    history = empty_history()  # of the line that it is on now
    history["val_loss"].add(40, 1.5)
    progress.adopt_history(history)
    assert (progress.best_val_loss, progress.best_step) == (1.5, 40)
    assert progress.metrics["val_loss"] == 1.5  # as long as nothing newer was measured
    progress.apply(Validated(step=70, metrics={"val_loss": 2.0}, best=False))
    progress.adopt_history(history)
    assert progress.metrics["val_loss"] == 2.0


def test_who_comes_late_hears_of_no_measurement_that_was_left_behind() -> None:
    present = Present()
    kept, left = (Validated(step=at_step, metrics={"val_loss": 1.0}, best=True) for at_step in (40, 80))
    for event in (opened(0), kept, left, opened(60)):
        present.take(event)
    assert [event for _, event in present.events() if isinstance(event, Validated)] == [kept]


def test_the_past_of_a_run_is_marked_as_it_would_have_been_by_one_who_was_there(tmp_path: Path) -> None:
    run = create_run(tmp_path, "demo", {"profile": {"kind": "retention-lm"}, "environment": {}})
    store, watcher = StoreWriter(run), Progress()
    events = [
        opened(0),
        CheckpointSaved(time=1.0, step=1, path="step-1", size_bytes=1, seconds=0.1),
        CheckpointSaved(time=3.0, step=3, path="step-3", size_bytes=1, seconds=0.1),
        Alarm(time=3.5, level="critical", text="it diverges"),
        dataclasses.replace(opened(1), time=4.0),
        CheckpointSaved(time=5.0, step=2, path="step-2", size_bytes=1, seconds=0.1),
    ]
    for event in events:
        if isinstance(event, RunOpened):
            store.begin_attempt(event.step, 100)
        if isinstance(event, CheckpointSaved):
            watcher.apply(step(event.step))
            store.record(event.step, {"time": event.time})
        store.record_event(event)
        watcher.apply(event)
    store.close()
    past = load_marks(run, math.inf)
    assert past == list(watcher.marks) == [
        Mark(1, MarkKind.CHECKPOINT), Mark(1, MarkKind.CRITICAL), Mark(2, MarkKind.CHECKPOINT)
    ]  # fmt: skip


def test_a_line_of_the_log_tells_of_no_step_that_was_left_behind() -> None:
    writer = LineWriter()
    rates = {"steps_per_second": 1.0, "tokens_per_second": 1.0, "learning_rate": 0.1, "trained_tokens": 1.0}
    rest = {**rates, "peak_memory_bytes": 1.0, "grad_norm": 1.0}
    for number in (61, 62, 63):
        writer.lines(step(number, loss=1.0 if number == 61 else 1000.0, **rest))
    writer.lines(opened(61))
    (gathered, _) = writer.lines(RunEnded(state=State.STOPPED, reason="", exit_code=0, step=61))
    assert "Iter 61: Train loss 1.000" in gathered


def test_alarms_that_were_read_before_are_not_unread_again() -> None:
    progress = Progress(read_until=1000.0)
    progress.apply(Alarm(time=999.0, level="warning", text="of yesterday"))
    progress.apply(RunEnded(time=999.5, state=State.FAILED, reason="diverged", exit_code=4, step=7))
    assert progress.unread == [] and len(progress.entries) == 2
    progress.apply(Alarm(time=1001.0, level="warning", text="new"))
    assert [entry.text for entry in progress.unread] == ["new"]


class OneLog(App[None]):
    def __init__(self, progress: Progress) -> None:
        super().__init__()
        self.log_of_events = EventLog(progress)

    def compose(self) -> ComposeResult:
        yield self.log_of_events


async def test_a_long_log_is_written_a_piece_at_a_time_and_whole() -> None:
    progress = Progress()
    for number in range(450):
        progress.note(f"entry {number}")
    app = OneLog(progress)
    async with app.run_test(size=(60, 20)) as pilot:
        app.log_of_events.rewrite()
        assert 0 < len(app.log_of_events.lines) <= 100
        progress.note("the last")
        app.log_of_events.show_progress()
        await wait_for(pilot, lambda: len(app.log_of_events.lines) == 451)
        await pilot.pause(0.1)
        said = [line.text.split("entry")[-1].split() for line in app.log_of_events.lines[:-1]]
        assert said == [[str(number)] for number in range(450)]
        assert "the last" in app.log_of_events.lines[-1].text


async def wait_for(pilot: Pilot[None], condition: Callable[[], bool]) -> None:
    for _ in range(100):
        if condition():
            return
        await pilot.pause(0.05)
    raise AssertionError


def test_alarms_and_a_failed_end_wait_for_a_reader() -> None:
    progress = Progress()
    progress.apply(Alarm(level="warning", text="the disk\nis full"))
    progress.apply(StateChanged(state=State.TRAINING))
    assert [entry.text for entry in progress.unread] == ["the disk is full"]
    progress.read_alarms()
    progress.apply(RunEnded(state=State.FAILED, reason="diverged", exit_code=4, step=7))
    assert [entry.text for entry in progress.unread] == ["failed at step 7: diverged"]
    assert len(progress.entries) == 2


@given(st.text())
def test_nothing_that_a_terminal_obeys_is_printed(text: str) -> None:
    shown = wording.printable(text)
    assert len(shown) == len(text)
    for before, after in zip(text, shown, strict=True):
        controls = unicodedata.category(before) == "Cc" and before not in "\n\t"
        assert unicodedata.category(after) != "Cc" or after in "\n\t"
        assert (before != after) == controls


class OneChat(App[None]):
    def __init__(self) -> None:
        super().__init__()
        self.sent: list[Command] = []

    def compose(self) -> ComposeResult:
        yield Chat(self.sent.append)


async def test_what_a_model_says_is_shown_and_not_obeyed() -> None:
    app = OneChat()
    async with app.run_test(size=(60, 20)) as pilot:
        app.query_one(Chat).focus_input()
        await pilot.press("h", "i", "enter")
        [ask] = app.sent
        assert isinstance(ask, Generate)
        for event in (
            AnswerStarted(answer=ask.answer, step=3),
            AnswerText(answer=ask.answer, text="[red]a\x1b[2J\x9b2Jb\x07\nnext"),
            AnswerEnded(answer=ask.answer, reason="length", tokens=2, seconds=1.0),
        ):
            app.query_one(Chat).take(event)
        app.query_one(Chat).show_answers()
        await pilot.pause()
        said = [str(line.render()) for line in app.query(".said").results(Static)]
    assert said == ["hi", "[red]a␛[2J\ufffd2Jb␇\nnext"]


@given(st.floats(allow_nan=True, allow_infinity=True))
@example(-99999999500.0)
def test_numbers_stay_short(value: float) -> None:
    for say in (wording.number, wording.thousands, wording.size, wording.scientific):
        assert 0 < len(say(value)) <= 12 or abs(value) > 1e12


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.4, "0 s"), (59.6, "1 m 00 s"), (3599, "59 m 59 s"), (18720, "5 h 12 m"), (90000, "1 d 01 h"), (None, "–")],
)
def test_durations_in_words(seconds: float | None, said: str) -> None:
    assert wording.duration(seconds) == said
