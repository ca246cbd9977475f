"""Guards by themselves: what each says to a course of readings, losses or hours, and when it keeps silent."""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Iterable, Iterator
from datetime import datetime

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import ExitCode
from engine.events import Level, Reading, State
from engine.guards import Action, ClearCache, End, Hold, LetGo, Shrink, Tell, Warn
from engine.guards.divergence import DivergenceGuard, Verdict
from engine.guards.early_stopping import EarlyStopping
from engine.guards.hang import HangGuard
from engine.guards.leak import LeakGuard
from engine.guards.limits import TimeLimits, next_occurrence
from engine.guards.memory import MemoryGuard
from engine.profile import DivergenceGuard as DivergenceSettings
from engine.profile import EarlyStopping as EarlyStoppingSettings
from engine.profile import MemoryGuard as MemorySettings

G, Y, R = Level.GREEN, Level.YELLOW, Level.RED
BEGAN = 1_800_000_000.0


def course(levels: Iterable[Level | None], every: float = 1.0) -> Iterator[Reading]:
    for second, level in enumerate(levels):
        yield Reading(time=BEGAN + every * second, level=level, cause="" if level is G else "the machine is full")


def actions(guard: MemoryGuard, readings: Iterable[Reading]) -> list[tuple[float, Action]]:
    judged = ((reading.time - BEGAN, guard.judge(reading)) for reading in readings)
    return [(second, action) for second, action in judged if action]


class TestMemory:
    settings = MemorySettings(yellow_seconds=10, red_seconds=3, green_seconds=20)

    def test_yellow_clears_the_cache_then_halves_again_and_again(self) -> None:
        done = actions(MemoryGuard(self.settings), course([G] * 5 + [Y] * 40))
        assert [(second, type(action)) for second, action in done] == [
            (15, ClearCache), (25, Shrink), (35, Shrink)
        ]  # fmt: skip
        assert done[0][1].reason == "memory pressure was yellow for 10 s (the machine is full)"  # type: ignore[union-attr]

    def test_red_holds_until_green_has_lasted(self) -> None:
        done = actions(MemoryGuard(self.settings), course([G, *[R] * 60, *[Y] * 30, *[G] * 10, R, R, *[G] * 40]))
        assert [(second, type(action)) for second, action in done] == [(4, Hold), (123, LetGo)]

    def test_red_stops_where_the_profile_says_so(self) -> None:
        stop = self.settings.model_copy(update={"on_red": "stop"})
        ((second, action),) = actions(MemoryGuard(stop), course([R] * 4))
        assert isinstance(action, End) and second == 3
        assert (action.outcome.state, action.outcome.exit_code) == (State.STOPPED, ExitCode.MEMORY)
        off = self.settings.model_copy(update={"on_red": "off", "shrink": False})
        assert not actions(MemoryGuard(off), course([R] * 100))
        assert [type(action) for _, action in actions(MemoryGuard(off), course([Y] * 100))] == [ClearCache]

    @given(st.lists(st.sampled_from([Y, R, None]), max_size=60), st.integers(1, 9))
    def test_what_comes_and_goes_is_not_acted_upon(self, levels: list[Level | None], worst: int) -> None:
        """However it flickers, pressure that never lasts its seconds without a green one causes nothing."""
        settings = MemorySettings(yellow_seconds=10, red_seconds=10, green_seconds=20)
        assert not actions(MemoryGuard(settings), course([level for one in levels for level in [*[one] * worst, G]]))

    def test_yellow_and_red_in_turns_are_pressure(self) -> None:
        done = actions(MemoryGuard(self.settings), course([Y, R] * 30))
        assert [type(action) for _, action in done] == [ClearCache, *[Shrink] * 4]

    def test_a_run_that_is_its_own_trouble_waits_longer_each_time(self) -> None:
        guard, readings, held = MemoryGuard(self.settings), 0.0, []
        for _ in range(8 * 3600):  # green while it is held, red as soon as it trains
            reading = Reading(time=BEGAN + readings, level=G if guard.holding else R)
            readings += 1
            held += [readings] if isinstance(guard.judge(reading), Hold) else []
        assert len(held) < 20
        pauses = np.diff(held)
        assert all(later >= earlier for earlier, later in itertools.pairwise(pauses)) and pauses[-1] > 3600

    def test_a_clock_that_is_set_back_is_no_end_of_it(self) -> None:
        levels = [Reading(time=BEGAN + second - (3600 if second > 1 else 0), level=R) for second in range(20)]
        assert [type(action) for action in map(MemoryGuard(self.settings).judge, levels) if action] == [Hold]

    @given(st.lists(st.sampled_from([G, Y, R, None]), max_size=200))
    def test_holding_and_letting_go_take_turns(self, levels: list[Level | None]) -> None:
        settings = MemorySettings(yellow_seconds=2, red_seconds=1, green_seconds=3)
        done = [action for _, action in actions(MemoryGuard(settings), course(levels))]
        turns = [type(action) for action in done if isinstance(action, Hold | LetGo)]
        assert turns == [Hold, LetGo] * (len(turns) // 2) + [Hold] * (len(turns) % 2)
        held = False
        for action in done:
            held = held if not isinstance(action, Hold | LetGo) else isinstance(action, Hold)
            assert not (held and isinstance(action, ClearCache | Shrink)), "a held run is left alone"

    def test_an_overruled_guard_waits_for_another_red(self) -> None:
        guard = MemoryGuard(self.settings)
        assert [type(action) for _, action in actions(guard, course([R] * 10))] == [Hold]
        guard.overrule()
        later = (reading for reading in course([R] * 60 + [G] * 5 + [R] * 10) if reading.time > BEGAN + 10)
        assert [second for second, action in actions(guard, later) if isinstance(action, Hold)] == [68]

    def test_unknown_readings_change_nothing(self) -> None:
        assert actions(MemoryGuard(self.settings), course([R, None, None, R, R]))[0][0] == 3
        assert not actions(MemoryGuard(self.settings), course([None] * 100))

    def test_a_sleep_is_not_pressure(self) -> None:
        guard = MemoryGuard(self.settings)
        awake = [Reading(time=BEGAN, level=R), Reading(time=BEGAN + 3600, level=R), Reading(time=BEGAN + 3601, level=R)]
        assert not actions(guard, awake)


class TestLeak:
    def warnings(self, hours: float, used: Iterable[float], available: float = 2e9) -> list[tuple[float, Warn]]:
        guard, said = LeakGuard(24), []
        for index, gigabytes in enumerate(used):
            moment = BEGAN + 10 * index
            reading = Reading(time=moment, process_bytes=int(gigabytes * 1e9), available_bytes=int(available))
            if warning := guard.judge(reading):
                said.append((10 * index / 3600, warning))
        assert hours == pytest.approx(10 * index / 3600, abs=0.1)
        return said

    def test_a_floor_that_rises_is_told_with_slope_and_time(self) -> None:
        noise = np.random.default_rng(0).uniform(0, 1.0, 4 * 360)
        used = 3 + 0.1 * np.arange(4 * 360) / 360 + noise  # 100 MB an hour under a gigabyte of coming and going
        first, *later = self.warnings(4, used)
        assert 1 <= first[0] <= 3.5
        assert "MB an hour" in first[1].text
        slope = float(first[1].text.split("grows by ")[1].split(" MB")[0].replace(",", ""))
        assert slope == pytest.approx(100, rel=0.3)
        hours = float(first[1].text.split("limit in ")[1].split(" h")[0])
        assert hours == pytest.approx(2000 / slope, rel=0.05)
        assert not later, "again only when half of that time has passed"

    def test_coming_and_going_is_no_leak(self) -> None:
        rng = np.random.default_rng(1)
        assert not self.warnings(8, 3 + rng.uniform(0, 2, 8 * 360))
        assert not self.warnings(8, 3 + np.minimum(1, np.arange(8 * 360) / 120)), "it settles in, then stays"
        assert not self.warnings(8, 3 + (np.arange(8 * 360) % 180) / 180), "a saw-tooth that is given back"

    def test_a_slow_one_is_no_matter_for_this_night(self) -> None:
        assert not self.warnings(8, 3 + 0.05 * np.arange(8 * 360) / 360, available=100e9)


class TestDivergence:
    settings = DivergenceSettings(window_steps=32, skips=2, rollbacks=1)

    def judge(self, guard: DivergenceGuard, *losses: float, norm: float = 1.0, rollbacks: int = 0) -> list[Verdict]:
        return [guard.judge(loss, norm, rollbacks).verdict for loss in losses]

    def calm(self) -> DivergenceGuard:
        guard = DivergenceGuard(self.settings)
        losses = np.random.default_rng(0).normal(3, 0.1, 64)
        assert set(self.judge(guard, *losses)) == {Verdict.APPLY}
        return guard

    def test_steps_in_a_row(self) -> None:
        guard = DivergenceGuard(self.settings)
        judged = [(math.nan, 1), (1, math.inf), (1, 1), (math.nan, math.nan), (math.inf, 1), (1, math.nan)]
        verdicts = [guard.judge(loss, norm, 0).verdict for loss, norm in judged]
        skip, apply = Verdict.SKIP, Verdict.APPLY
        assert verdicts == [skip, skip, apply, skip, skip, Verdict.GO_BACK]
        assert guard.judge(math.nan, 1, 1).verdict is Verdict.STOP

    def test_a_spike_of_the_loss(self) -> None:
        judgement = self.calm().judge(4.0, 1.0, 0)
        assert judgement.verdict is Verdict.SKIP and "standard deviations" in judgement.reason
        assert self.judge(self.calm(), 3.4, 2.0, -1.0) == [Verdict.APPLY] * 3

    def test_a_spike_of_the_gradient(self) -> None:
        assert self.judge(self.calm(), 3.0, norm=999.0) == [Verdict.APPLY]
        assert self.judge(self.calm(), 3.0, norm=1001.0) == [Verdict.SKIP]

    def test_a_level_that_stays_is_sent_back(self) -> None:
        """A loss that jumps and stays has diverged: it never becomes what is usual."""
        for known in (8, 32):  # with a window that has just begun, and a full one
            guard = DivergenceGuard(self.settings)
            self.judge(guard, *np.random.default_rng(0).normal(3, 0.1, known))
            higher = np.random.default_rng(2).normal(6, 0.2, 8)
            assert self.judge(guard, *higher) == [Verdict.SKIP, Verdict.SKIP, *[Verdict.GO_BACK] * 6]

    def test_single_bad_batches_are_skipped_for_ever(self) -> None:
        guard = self.calm()
        assert self.judge(guard, *[9.0, 3.0] * 100) == [Verdict.SKIP, Verdict.APPLY] * 100

    def test_zeros_are_no_defect(self) -> None:
        guard = DivergenceGuard(self.settings)
        assert set(self.judge(guard, *[0.0] * 40, norm=0.0)) == {Verdict.APPLY}
        assert guard.judge(0.0, 5.0, 0).verdict is Verdict.APPLY
        assert guard.judge(1.0, 0.0, 0).verdict is Verdict.APPLY

    def test_what_runs_away_is_sent_back(self) -> None:
        assert Verdict.GO_BACK in self.judge(self.calm(), *[3 * 3.0**n for n in range(1, 8)])

    def test_nothing_is_judged_before_there_is_a_window(self) -> None:
        assert self.judge(DivergenceGuard(self.settings), 1.0, 100.0, 10_000.0) == [Verdict.APPLY] * 3

    def test_off_is_off(self) -> None:
        guard = DivergenceGuard(self.settings.model_copy(update={"loss_sigma": 0, "grad_norm_factor": 0}))
        assert self.judge(guard, *[1.0] * 64, 1e9, norm=1.0) == [Verdict.APPLY] * 65

    def test_it_goes_on_as_it_was_saved(self) -> None:
        guard, again = self.calm(), DivergenceGuard(self.settings)
        self.judge(guard, 9.0)
        again.restore(guard.state())
        for loss in (3.0, 4.5, math.nan, 9.0, 9.0):
            assert guard.judge(loss, 1.0, 0) == again.judge(loss, 1.0, 0)


class TestEarlyStopping:
    def judge(self, guard: EarlyStopping, *pairs: tuple[float, float]) -> list[list[Action]]:
        return [guard.judge(10 * number, *pair) for number, pair in enumerate(pairs, 1)]

    def test_patience(self) -> None:
        guard = EarlyStopping(EarlyStoppingSettings(patience=2, least_improvement=0.1))
        *before, last = self.judge(guard, (3.0, 3.0), (2.5, 3.0), (2.45, 3.0), (2.5, 3.0))
        assert before == [[], [], []]
        (end,) = last
        assert isinstance(end, End) and end.outcome.exit_code == ExitCode.OK
        assert "2 validations" in end.outcome.reason and "2.500 at step 20" in end.outcome.reason

    def test_without_patience_it_never_stops(self) -> None:
        assert self.judge(EarlyStopping(EarlyStoppingSettings()), *[(3.0, 3.0)] * 50) == [[]] * 50

    def test_overfitting_is_told_once(self) -> None:
        guard = EarlyStopping(EarlyStoppingSettings())
        said = self.judge(guard, *[(3.0 + 0.1 * n, 3.0 - 0.1 * n) for n in range(8)])
        assert [len(actions) for actions in said] == [0, 0, 0, 1, 0, 0, 0, 0]
        assert isinstance(said[3][0], Warn) and "step 10" in said[3][0].text

    def test_a_loss_that_rises_with_the_training_loss_is_something_else(self) -> None:
        assert not any(self.judge(EarlyStopping(EarlyStoppingSettings()), *[(3 + n, 3 + n) for n in range(9)]))

    def test_it_goes_on_as_it_was_saved(self) -> None:
        settings = EarlyStoppingSettings(patience=3, on_overfitting="stop")
        guard, again = EarlyStopping(settings), EarlyStopping(settings)
        self.judge(guard, (3.0, 3.0), (3.1, 2.9), (3.2, 2.8))
        again.restore(guard.state())
        assert guard.judge(40, 3.3, 2.7) == again.judge(40, 3.3, 2.7) != []


class TestLimits:
    @pytest.fixture(autouse=True)
    def _in_berlin(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        monkeypatch.setitem(os.environ, "TZ", "Europe/Berlin")
        time.tzset()
        yield
        monkeypatch.undo()
        time.tzset()

    @pytest.mark.parametrize(
        ("began", "clock", "expected"),
        [
            ("2026-11-20 23:00", "07:00", "2026-11-21 07:00"),
            ("2026-11-21 06:59", "07:00", "2026-11-21 07:00"),
            ("2026-11-21 07:00", "7:00", "2026-11-22 07:00"),
            ("2026-03-28 23:00", "07:00", "2026-03-29 07:00"),  # the clocks go forward in that night
            ("2026-10-24 23:00", "07:00", "2026-10-25 07:00"),  # and back
        ],
    )
    def test_the_next_time_the_clock_shows_it(self, began: str, clock: str, expected: str) -> None:
        moment = next_occurrence(clock, datetime.fromisoformat(began).timestamp())
        assert datetime.fromtimestamp(moment).isoformat(" ", "minutes") == expected

    def test_a_run_ends_at_the_earlier_of_both(self) -> None:
        began = datetime.fromisoformat("2026-11-20 23:00").timestamp()
        limits = TimeLimits("07:00", 2.5, began, began)
        assert limits.moment == began + 2.5 * 3600
        assert limits.judge(began + 2.4 * 3600) is None
        end = limits.judge(began + 2.5 * 3600)
        assert end and end.outcome.reason == "2.5 h have passed (guard.max_hours)" and not end.outcome.exit_code
        end = TimeLimits("07:00", 20, began, began).judge(began + 8 * 3600)
        assert end and end.outcome.reason == "it is 07:00 (guard.stop_at)"
        set_in_the_morning = TimeLimits("07:00", None, began, began + 10 * 3600)
        assert set_in_the_morning.judge(began + 10 * 3600) is None
        assert set_in_the_morning.moment == next_occurrence("07:00", began + 10 * 3600)
        assert TimeLimits(None, None, began, began).judge(began + 1e9) is None


class TestHang:
    def test_a_silence_is_told_once_and_its_end(self) -> None:
        guard = HangGuard(20, least_seconds=5)
        for second in range(10):
            guard.beat(1.0, now=second)
        assert guard.judge(now=9 + 19.9) is None
        warning = guard.judge(now=9 + 20.1)
        assert isinstance(warning, Warn) and warning.critical and "no progress for 20 s" in warning.text
        assert guard.judge(now=100) is None
        guard.beat(now=110)
        assert isinstance(guard.judge(now=110), Tell)
        assert guard.judge(now=111) is None

    def test_short_steps_have_time_for_a_checkpoint(self) -> None:
        guard = HangGuard(20, least_seconds=30)
        for second in range(10):
            guard.beat(0.01, now=0.01 * second)
        assert guard.judge(now=29) is None and isinstance(guard.judge(now=31), Warn)

    def test_a_paused_run_does_not_hang(self) -> None:
        guard = HangGuard(20, least_seconds=1)
        for second in range(10):
            guard.beat(0.1, now=second)
        guard.rest()
        assert guard.judge(now=1e6) is None
        guard.beat(now=1e6)
        assert guard.judge(now=1e6 + 1.5) is None and isinstance(guard.judge(now=1e6 + 2.5), Warn)

    def test_before_it_knows_a_step_it_says_nothing(self) -> None:
        guard = HangGuard(20, least_seconds=1)
        guard.beat(0.1, now=0)
        assert guard.judge(now=1e6) is None
