"""The plan of memory and time: against real models and real steps, and what it says where something does not fit."""

from __future__ import annotations

import contextlib
import json
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from statistics import median

import psutil
import pytest

from engine.errors import UserError
from engine.events import Level
from engine.models.retention_lm import RetentionLM
from engine.planner import Plan, plan, refuse_what_cannot_fit, suggest
from engine.planning import IN_MLX, Setting, demand_of, micro_batch
from engine.planning.capacity import Capacity, this_capacity
from engine.planning.measure import measure
from engine.planning.pace import remember
from engine.planning.report import as_table
from engine.profile import Profile
from engine.profile_files import list_profiles, load_profile
from engine.store import RunDirectory
from engine.tasks.retention_lm import model_config
from retention_tui.session import Session

from mlx.utils import tree_flatten

CPU = Setting()
GB = 10**9
ROOMY = Capacity(limit_bytes=1000 * GB)


@pytest.fixture(autouse=True)
def _own_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured in a test is remembered for that test."""
    monkeypatch.setenv("RETENTION_TUI_CACHE", str(tmp_path / "cache"))


def shipped(name: str, *settings: str) -> Profile:
    return load_profile(name, settings)


def on_cpu(profile: Profile, capacity: Capacity = ROOMY) -> Plan:
    return plan(profile, capacity=capacity, setting=CPU)


# Memory


@pytest.mark.parametrize("name", [profile.name for profile in list_profiles() if profile.kind == "retention-lm"])
def test_weights_are_those_of_the_model(name: str) -> None:
    profile = shipped(name)
    model = RetentionLM(model_config(profile.model))  # lazy: nothing is allocated
    weights = sum(array.size for _, array in tree_flatten(model.trainable_parameters()))
    made = on_cpu(profile)
    assert made.parameters == weights
    assert made.components["trained_weights"] == 4 * weights
    assert made.components["optimizer_state"] == 8 * weights


@pytest.mark.parametrize(
    "settings",
    [
        {"train.batch_size": 32},  # attention form, activations
        {"train.batch_size": 32, "train.gradient_checkpointing": "true", "model.layers": 6},
        {"train.batch_size": 8, "train.micro_batch_size": 4, "train.sequence_length": 384, "model.switch_over": 128},
        {"train.batch_size": 6, "model.vocab_size": 60_000, "model.width": 32, "model.layers": 1},  # loss
        {"train.batch_size": 1, "train.sequence_length": 16, "model.width": 256, "model.heads": 8},  # the update
    ],
)
def test_the_predicted_peak_is_within_a_tenth_of_the_measured_one(settings: dict[str, object]) -> None:
    profile = shipped("retention-ultra-tiny", *(f"{key}={value}" for key, value in settings.items()))
    made, measured = on_cpu(profile), measure(profile, seconds=0)
    assert made.predicted_peak_bytes == pytest.approx(measured.peak_bytes, rel=0.1)
    assert made.components["optimizer_state"] == pytest.approx(measured.optimizer_bytes, rel=0.001)
    assert made.components["trained_weights"] == measured.trained_weight_bytes == measured.gradient_bytes


@pytest.mark.parametrize(
    ("name", "micro", "length", "switch_over", "checkpointing", "measured_mb"),
    [
        ("retention-ultra-tiny", 32, 128, 1024, False, 255),
        ("retention-ultra-tiny", 16, 2048, 1024, True, 840),
        ("demo", 64, 128, 1024, False, 903),
        ("demo", 256, 128, 1024, False, 2_756),
        ("retention-tiny", 8, 256, 1024, False, 2_900),
        ("retention-tiny", 32, 1024, 1024, False, 19_624),
        ("retention-tiny", 8, 2048, 1024, True, 2_527),
        ("retention-small", 1, 256, 1024, False, 3_046),
        ("retention-small", 16, 1024, 1024, False, 34_178),
        ("retention-small", 16, 1024, 1024, True, 6_937),
        ("retention-small", 16, 1024, 256, False, 20_871),
        ("retention-small", 16, 2048, 1024, True, 8_257),
        ("retention-small", 1, 8192, 1024, False, 13_063),
    ],
)
def test_the_peaks_measured_on_an_h200_are_foreseen(
    name: str, micro: int, length: int, switch_over: int, checkpointing: bool, measured_mb: int
) -> None:
    settings = {"batch_size": 2 * micro, "micro_batch_size": micro, "sequence_length": length}
    changed = [f"train.{key}={value}" for key, value in settings.items()]
    changed += [f"model.switch_over={switch_over}", f"train.gradient_checkpointing={str(checkpointing).lower()}"]
    made = plan(shipped(name, *changed), capacity=ROOMY, setting=Setting(gpu=True, compute_bytes=2, buffer_mb=64))
    assert made.predicted_peak_bytes / 1e6 == pytest.approx(measured_mb, rel=0.1)


def test_smaller_command_buffers_keep_less_in_flight() -> None:
    profile = shipped("retention-tiny")
    large, small = (plan(profile, capacity=ROOMY, setting=Setting(gpu=True, buffer_mb=size)) for size in (64, 10))
    assert small.predicted_peak_bytes < 0.6 * large.predicted_peak_bytes
    assert "activations" in small.components


def test_components_add_up_to_the_peak_and_to_the_need() -> None:
    made = on_cpu(shipped("retention-tiny"))
    assert made.predicted_peak_bytes == sum(size for name, size in made.components.items() if name in IN_MLX)
    assert made.need_bytes == sum(made.components.values()) > made.predicted_peak_bytes
    moments = demand_of(made.profile).moments(made.profile, CPU)
    assert made.predicted_peak_bytes == max(moment.total_bytes for moment in moments)


def test_gradient_checkpointing_takes_less_and_the_plan_tells_both() -> None:
    off = on_cpu(shipped("retention-small"))
    on = on_cpu(shipped("retention-small", "train.gradient_checkpointing=true"))
    assert on.predicted_peak_bytes < 0.5 * off.predicted_peak_bytes
    assert on.activation_bytes == off.activation_bytes
    assert on.activation_bytes[True] < 0.3 * on.activation_bytes[False]


def test_lengths_beyond_the_switch_over_take_memory_in_proportion() -> None:
    needs = [
        on_cpu(shipped("retention-small", "train.micro_batch_size=1", f"train.sequence_length={length}"))
        for length in (16_384, 32_768, 65_536)
    ]
    one, two, four = (made.components["activations"] + made.components["retention_states"] for made in needs)
    assert (four - two) / (two - one) == pytest.approx(2, rel=0.02)


def test_half_precision_takes_copies_of_the_weights_and_smaller_activations() -> None:
    profile = shipped("retention-small")
    full, half = (plan(profile, capacity=ROOMY, setting=Setting(gpu=True, compute_bytes=size)) for size in (4, 2))
    assert "compute_copies" not in full.components
    assert half.components["compute_copies"] == half.components["trained_weights"] / 2
    assert half.components["activations"] < full.components["activations"]


def test_ranks_share_the_batch() -> None:
    profile = shipped("retention-ultra-tiny", "train.batch_size=32")
    assert micro_batch(profile, ranks=4) == 8
    shared = plan(profile, capacity=ROOMY, setting=Setting(ranks=4))
    alone = on_cpu(shipped("retention-ultra-tiny", "train.batch_size=8"))
    assert shared.components == alone.components


# The verdict


def test_the_verdict_against_a_limit() -> None:
    profile = shipped("retention-tiny")
    need = on_cpu(profile).need_bytes
    levels = {share: plan(profile, limit_bytes=int(need * share), setting=CPU).level for share in (0.9, 1.05, 2)}
    assert levels == {0.9: Level.RED, 1.05: Level.YELLOW, 2: Level.GREEN}


def test_what_is_free_now_makes_it_tight_and_not_impossible() -> None:
    made = on_cpu(shipped("retention-tiny"), Capacity(limit_bytes=64 * GB, available_bytes=GB))
    assert made.level is Level.YELLOW
    assert "1.0 GB are free now" in made.warning and "--set train.micro_batch_size=" in made.warning


def test_a_gpu_has_its_own_limit() -> None:
    profile, setting = shipped("retention-small"), Setting(gpu=True)
    peak = plan(profile, capacity=ROOMY, setting=setting).predicted_peak_bytes
    apart = Capacity(limit_bytes=GB, device_bytes=2 * peak, shared=False)
    assert plan(profile, capacity=apart, setting=setting).level is Level.GREEN  # the machine's own memory is another
    metal = Capacity(limit_bytes=4 * peak, device_bytes=int(0.9 * peak))
    made = plan(profile, capacity=metal, setting=setting)
    assert made.level is Level.RED and "what Metal recommends" in made.verdict


def test_unknown_memory_is_not_called_too_little() -> None:
    made = on_cpu(shipped("retention-7b"), Capacity(limit_bytes=None))
    assert made.level is None and "what this machine has is unknown" in made.verdict and "fits:" not in made.verdict
    assert made.suggestions == () and made.warning == "" and as_table(made)["verdict"] == "unknown"
    refuse_what_cannot_fit(made)
    apart = Capacity(limit_bytes=64 * GB, shared=False)  # a GPU of its own, of which nothing is known
    assert on_cpu(shipped("retention-tiny"), apart).level is None
    limited = shipped("retention-7b", "guard.memory.limit_gb=1")
    assert on_cpu(limited, Capacity(limit_bytes=None)).level is Level.RED  # what is known counts all the same


def test_the_guards_own_limit_counts_against_mlx() -> None:
    peak = on_cpu(shipped("retention-tiny")).predicted_peak_bytes / GB
    levels = {
        share: on_cpu(shipped("retention-tiny", f"guard.memory.limit_gb={share * peak}")).level
        for share in (0.99, 1.03, 2)
    }
    assert levels == {0.99: Level.RED, 1.03: Level.YELLOW, 2: Level.GREEN}
    limit = f"guard.memory.limit_gb={0.7 * peak}"
    made = on_cpu(shipped("retention-tiny", limit))
    with pytest.raises(UserError, match=r"guard\.memory\.limit_gb allows .*it fits with --set"):
        refuse_what_cannot_fit(made)
    for suggestion in made.suggestions:
        assert on_cpu(shipped("retention-tiny", limit, *suggestion.settings)).level is Level.GREEN


def test_ranks_of_one_machine_share_its_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    profile = shipped("retention-tiny")
    need = on_cpu(profile).need_bytes
    levels = {
        processes: on_cpu(profile, Capacity(limit_bytes=int(1.5 * need), processes=processes)).level
        for processes in (1, 2)
    }
    assert levels == {1: Level.GREEN, 2: Level.RED}
    assert "by each of 2 processes" in on_cpu(profile, Capacity(limit_bytes=need, processes=2)).verdict
    hosts = tmp_path / "hosts.json"
    hosts.write_text(json.dumps([["127.0.0.1:5000"], ["127.0.0.1:5001"], ["10.0.0.2:5000"]]))
    monkeypatch.setenv("MLX_HOSTFILE", str(hosts))
    monkeypatch.setenv("MLX_RANK", "1")
    assert this_capacity().processes == 2


# What would fit


@pytest.mark.parametrize("limit_gb", [40, 14, 9, 5])
def test_each_suggestion_fits_as_it_says(limit_gb: int) -> None:
    capacity = Capacity(limit_bytes=limit_gb * GB)
    settings = ["train.micro_batch_size=32"]
    made = on_cpu(shipped("retention-small", *settings), capacity)
    assert made.level is Level.RED and made.suggestions
    for suggestion in made.suggestions:
        changed = on_cpu(shipped("retention-small", *settings, *suggestion.settings), capacity)
        assert changed.level is Level.GREEN
        assert changed.need_bytes == suggestion.need_bytes == made.need_bytes - suggestion.saving_bytes
        assert changed.profile.train.batch_size == made.profile.train.batch_size
        assert changed.micro_batch_size * changed.accumulation == made.profile.train.batch_size


def test_suggestions_come_in_order_and_change_no_more_than_needed() -> None:
    profile = shipped("retention-small", "train.micro_batch_size=32")
    alone = suggest(profile, 24 * GB, setting=CPU)
    keys = [[setting.partition("=")[0] for setting in suggestion.settings] for suggestion in alone]
    ways = ["train.micro_batch_size", "train.gradient_checkpointing", "train.backward", "train.sequence_length"]
    assert keys == [[way] for way in ways]
    twice = int(alone[0].settings[0].partition("=")[2]) * 2
    larger = plan(shipped("retention-small", f"train.micro_batch_size={twice}"), limit_bytes=24 * GB, setting=CPU)
    assert larger.level is not Level.GREEN
    assert "the same effective batch" in alone[0].words

    (together,) = suggest(profile, 4_500_000_000, setting=CPU)
    assert [setting.partition("=")[0] for setting in together.settings] == [
        "train.micro_batch_size",
        "train.gradient_checkpointing",
    ]


def test_where_nothing_fits_it_says_what_weights_alone_take() -> None:
    made = on_cpu(shipped("retention-7b"), Capacity(limit_bytes=25 * GB))
    assert made.suggestions == ()
    assert "weights and optimizer alone take 80.0 GB" in made.verdict
    with pytest.raises(UserError, match=r"nothing of this fits.*--anyway"):
        refuse_what_cannot_fit(made)


def test_what_is_only_tight_is_not_refused() -> None:
    profile = shipped("retention-tiny")
    need = on_cpu(profile).need_bytes
    refuse_what_cannot_fit(plan(profile, limit_bytes=int(1.02 * need), setting=CPU))
    with pytest.raises(UserError, match=r"it fits with --set train\.micro_batch_size="):
        refuse_what_cannot_fit(plan(profile, limit_bytes=int(0.98 * need), setting=CPU))


# Operations and time


def test_operations_are_those_of_the_weights_and_of_the_op() -> None:
    profile = shipped("retention-small")
    tokens, weights = 64 * 1024, on_cpu(profile).parameters
    operations = demand_of(profile).operations(profile)
    assert 6 * weights * tokens < operations < 1.4 * 6 * weights * tokens
    checkpointed = shipped("retention-small", "train.gradient_checkpointing=true")
    assert 1.2 < demand_of(profile).operations(checkpointed) / operations < 4 / 3


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, shared_tiny: Path) -> Path:
    """A folder with one finished run of the tiny profile, trained here."""
    folder = tmp_path_factory.mktemp("earlier") / "runs"
    session = Session(folder)
    session.start(str(shared_tiny), name="earlier")
    assert session.finish() == 0
    return folder


def test_time_comes_from_earlier_runs_of_the_same_shape(runs: Path, shared_tiny: Path) -> None:
    _, rates = RunDirectory(runs / "earlier").curve("steps_per_second")
    timing = plan(load_profile(str(shared_tiny), ["train.steps=400", "seed=7"]), runs_folder=runs).timing
    assert (timing.source, timing.samples) == ("earlier runs", 12)
    assert timing.seconds_a_step == pytest.approx(1 / median(rates.tolist()))
    assert timing.seconds == pytest.approx(400 * timing.seconds_a_step)


def test_time_of_another_shape_is_an_estimate_by_its_operations(runs: Path, shared_tiny: Path) -> None:
    same, wider = (load_profile(str(shared_tiny), settings) for settings in ([], ["model.width=128"]))
    known, estimate = (plan(profile, runs_folder=runs).timing for profile in (same, wider))
    assert estimate.source == "estimate"
    ratio = demand_of(wider).operations(wider) / demand_of(same).operations(same)
    assert estimate.seconds_a_step == pytest.approx(known.seconds_a_step * ratio, rel=1e-6)
    far = load_profile(str(shared_tiny), ["model.width=1024", "model.layers=12"])
    timing = plan(far, runs_folder=runs).timing
    assert (timing.source, timing.seconds_a_step) == ("unknown", None)


def test_time_is_unknown_from_another_machine_and_without_runs(runs: Path, shared_tiny: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(runs, elsewhere)
    identity = json.loads((elsewhere / "earlier" / "run.json").read_text())
    identity["environment"]["machine"]["processor"] = "another"
    (elsewhere / "earlier" / "run.json").write_text(json.dumps(identity))
    profile = load_profile(str(shared_tiny))
    for folder in (elsewhere, tmp_path / "none", None):
        timing = plan(profile, runs_folder=folder).timing
        assert (timing.source, timing.seconds) == ("unknown", None)
    assert plan(profile, runs_folder=runs, except_run="earlier").timing.source == "unknown"


def test_a_measurement_is_remembered(shared_tiny: Path) -> None:
    profile = load_profile(str(shared_tiny))
    assert plan(profile).timing.source == "unknown"
    measured = measure(profile, seconds=0)
    timing = plan(profile).timing
    assert (timing.source, timing.seconds_a_step) == ("measured", measured.seconds_a_step)


def test_time_of_the_newest_of_several_alike(runs: Path, shared_tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    profile = load_profile(str(shared_tiny))
    for seconds, steps, hours in ((7.0, 150, 2), (3.0, 20, 1)):
        then = time.time() - 3600 * hours
        with monkeypatch.context() as past:
            past.setattr(time, "time", lambda then=then: then)
            remember(profile, seconds, steps)
    assert plan(profile).timing.seconds_a_step == 3.0
    assert plan(profile, runs_folder=runs).timing.source == "earlier runs"  # of less than an hour ago
    remember(profile, 5.0, 1)
    assert plan(profile, runs_folder=runs).timing.seconds_a_step == 5.0


def test_steps_count_for_the_micro_batch_that_they_had(runs: Path, shared_tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "shrunk"
    shutil.copytree(runs, folder)
    with contextlib.closing(sqlite3.connect(folder / "earlier" / "run.sqlite")) as database, database:
        (metric,) = database.execute("SELECT id FROM metric WHERE name = 'micro_batch_size'").fetchone()
        database.execute("UPDATE value SET value = 2 WHERE metric = ? AND step > 4", (metric,))
    begun, shrunk = (load_profile(str(shared_tiny), [f"train.micro_batch_size={size}"]) for size in (4, 2))
    rates = RunDirectory(folder / "earlier").tail("steps_per_second", 8)
    assert sorted(rates) == list(range(5, 13))
    timing = plan(shrunk, runs_folder=folder).timing
    assert (timing.source, timing.samples) == ("earlier runs", 8)
    assert timing.seconds_a_step == pytest.approx(1 / median(rates.values()))
    assert plan(begun, runs_folder=folder).timing.source == "estimate"


@pytest.mark.parametrize(
    "setting",
    ["guard.max_hours=1e308", "guard.memory.limit_gb=1e308", f"train.steps=1{400 * '0'}", f"train.tokens=1{400 * '0'}"],
)
def test_lengths_beyond_all_measure_are_refused(setting: str) -> None:
    with pytest.raises(UserError, match=setting.partition("=")[0].rpartition(".")[2]):
        shipped("demo", setting)


def test_the_longest_of_runs_is_planned(runs: Path, shared_tiny: Path) -> None:
    longest = load_profile(str(shared_tiny), ["train.steps=1000000000000", "guard.max_hours=8784"])
    timing = plan(longest, runs_folder=runs).timing
    within = timing.steps_within(time.time())
    assert within is not None and timing.seconds_a_step
    assert within == pytest.approx(8784 * 3600 / timing.seconds_a_step, rel=1e-6)


def test_too_few_steps_by_the_time_to_stop(runs: Path, shared_tiny: Path) -> None:
    then = datetime.now() + timedelta(hours=2)
    limits = [f"guard.stop_at={then:%H:%M}", "train.steps=1000000000"]
    timing = plan(load_profile(str(shared_tiny), limits), runs_folder=runs).timing
    assert timing.limit == f"by {then:%H:%M}" and timing.seconds_a_step
    within = timing.steps_within(time.time())
    assert within == pytest.approx(2 * 3600 / timing.seconds_a_step, rel=0.02)
    hours = plan(load_profile(str(shared_tiny), ["guard.max_hours=0.5"]), runs_folder=runs).timing
    assert hours.limit == "in 0.5 h" and hours.steps_within(time.time()) == 12  # all of them
    assert replace(timing, seconds_a_step=None).steps_within(time.time()) is None


def test_a_measured_step_that_is_killed_is_told_in_one_line() -> None:
    profile = shipped("retention-tiny", "train.batch_size=64", "train.micro_batch_size=32")
    failures: list[str] = []

    def take() -> None:
        try:
            measure(profile)
        except UserError as error:
            failures.append(str(error))

    thread = threading.Thread(target=take)
    thread.start()
    until(lambda: any("engine.planning.measure" in child.cmdline() for child in psutil.Process().children()))
    for child in psutil.Process().children():
        if "engine.planning.measure" in child.cmdline():
            child.kill()
    thread.join(30)
    assert len(failures) == 1 and "killed by the system" in failures[0]


def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
