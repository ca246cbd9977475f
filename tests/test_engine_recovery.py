"""What a run does when it gets into trouble: no memory, pressure, divergence, silence. It stays on its course."""

from __future__ import annotations

import itertools
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from ride import Ride, Start, losses, same, weights

from engine.backend import is_out_of_memory, mx
from engine.checkpoint import list_checkpoints
from engine.commands import Resume, Set, Stop
from engine.errors import ExitCode
from engine.events import Alarm, CheckpointSaved, Level, Notice, Reading, RunOpened, State, StateChanged, StepCompleted
from engine.store import RunDirectory

G, Y, R = Level.GREEN, Level.YELLOW, Level.RED
NO_MEMORY = "[metal::malloc] Unable to allocate 123 bytes."


class Script:
    """A machine that is green until `begins`, then as written down, one level a look; the last one stays."""

    def __init__(self, *levels: Level) -> None:
        self._levels = list(levels)
        self.begins = threading.Event()

    def read(self) -> Reading:
        level = G
        if self.begins.is_set():
            level = self._levels.pop(0) if len(self._levels) > 1 else self._levels[0]
        return Reading(level=level, cause="" if level is G else "as written", process_bytes=10**8)


class Shortage:
    """MLX without memory: its functions, called by an engine, raise as Metal does where `fails(number of call)`."""

    POINTS = ((mx, "eval"), (mx, "async_eval"), (mx.random, "key"))

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fails: Callable[[int], bool]) -> None:
        self.calls = itertools.count()
        for module, name in self.POINTS:
            monkeypatch.setattr(module, name, self._short(getattr(module, name), fails))

    def _short(self, function: Callable[..., object], fails: Callable[[int], bool]) -> Callable[..., object]:
        def call(*arguments: object) -> object:
            if threading.current_thread().name.startswith("engine of") and fails(next(self.calls)):
                raise RuntimeError(NO_MEMORY)
            return function(*arguments)

        return call


SHORT = {"train.steps": 4, "checkpoint.every": 2, "validate.every": 3, "validate.batches": 1}


@pytest.fixture
def alone(start: Start) -> Ride:
    """The run with room to spare."""
    ride = start(**SHORT)
    assert ride.end().exit_code == ExitCode.OK
    return ride


def equal(one: RunDirectory, other: RunDirectory) -> bool:
    return bool(np.allclose(losses(one), losses(other), rtol=0, atol=1e-4)) and len(losses(one)) == len(losses(other))


@pytest.mark.parametrize(("backward", "opening", "every"), [("whole", 3, 1), ("layerwise", 12, 23)])
def test_memory_that_runs_out_anywhere_in_a_step(
    start: Start, alone: Ride, monkeypatch: pytest.MonkeyPatch, backward: str, opening: int, every: int
) -> None:
    """At every call of MLX, from the first step to the last: the same losses, with a smaller micro-batch.

    By `opening` the weights are made, and layer by layer the model was compared with its parts; before that the model
    itself does not fit. Layer by layer there are many calls: one of `every`.
    """
    settings = SHORT | {"train.backward": backward}
    with monkeypatch.context() as patch:
        counted = Shortage(patch, lambda call: False)
        start(**settings).end()
        total = next(counted.calls)
    assert total >= opening + 6 * 4
    for point in range(opening, total, every):
        with monkeypatch.context() as patch:
            Shortage(patch, lambda call, point=point: call == point)  # type: ignore[misc]
            ride = start(**settings)
            ended = ride.end()
        assert ended.exit_code == ExitCode.OK, (point, ended)
        assert equal(ride.run, alone.run), point
        (alarm, *_) = ride.of(Alarm)
        assert alarm.text == f"out of memory ({NO_MEMORY}): micro-batch 4 → 2, still 8 sequences a step", point
        last_state = [event.state for event in ride.of(StateChanged)][-1]
        assert last_state is State.TRAINING, point


def test_the_smallest_micro_batch_that_does_not_fit_ends_the_run(
    start: Start, alone: Ride, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        short = threading.Event()
        Shortage(patch, lambda call: short.is_set())
        ride = start(**SHORT | {"train.steps": 100_000})
        ride.until_step(3)
        short.set()
        ended = ride.end()
    assert (ended.state, ended.exit_code) == (State.STOPPED, ExitCode.MEMORY)
    assert "smallest micro-batch" in ended.reason and "train.gradient_checkpointing=true" in ended.reason
    assert [alarm.text.split(": ")[1][:17] for alarm in ride.of(Alarm)] == ["micro-batch 4 → 2", "micro-batch 2 → 1"]
    assert list_checkpoints(ride.run)[-1].step == ended.step >= 3
    again = start(resume=ride.run, **SHORT | {"train.steps": ended.step + 2})
    assert again.end().exit_code == ExitCode.OK
    assert [step.metrics["micro_batch_size"] for step in again.of(StepCompleted)] == [1, 1], "it remembers"


def test_a_shortage_that_may_not_shrink_ends_the_run(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        Shortage(patch, lambda call: call == 20)
        ended = start(**SHORT, **{"guard.memory.shrink": False}).end()
    assert ended.exit_code == ExitCode.MEMORY


def test_an_update_that_fails_half_way_goes_back(start: Start, alone: Ride, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights may be spoiled then: those of the last checkpoint are taken, and the steps since are done again."""
    evaluate, fired = mx.eval, threading.Event()
    ride = start(**SHORT | {"train.steps": 40, "checkpoint.every": 10, "validate.every": 0})

    def fail(*arrays: object) -> None:
        if sys._getframe(1).f_code.co_name == "apply" and not fired.is_set() and ride.of(CheckpointSaved):
            fired.set()
            raise RuntimeError(NO_MEMORY)
        evaluate(*arrays)

    monkeypatch.setattr(mx, "eval", fail)
    ride.until(lambda event: isinstance(event, CheckpointSaved))
    assert ride.end().exit_code == ExitCode.OK
    first, second = ride.of(RunOpened)
    assert (first.step, first.attempt) == (0, 1) and second.step >= 10 and second.attempt == 2
    monkeypatch.undo()
    left_alone = start(**SHORT | {"train.steps": 40, "checkpoint.every": 10, "validate.every": 0})
    left_alone.end()
    assert equal(ride.run, left_alone.run)


def test_a_defect_is_no_shortage(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    ride = start(**SHORT | {"train.steps": 100_000})
    ride.until_step(3)

    def fail(*arrays: object) -> None:
        raise RuntimeError("something else")

    monkeypatch.setattr(mx, "eval", fail)
    ended = ride.end()
    monkeypatch.undo()
    assert (ended.state, ended.exit_code) == (State.FAILED, ExitCode.DEFECT)
    assert "something else" in ended.reason and "\n" not in ended.reason
    assert list_checkpoints(ride.run)[-1].step == ended.step
    assert "Traceback" in ride.run.log_path.read_text(encoding="utf-8")


LONGER = {  # rounding, which the order of sums decides, grows from step to step: tenfold in twenty here
    "train.steps": 60,
    "train.sequence_length": 128,
    "train.learning_rate": 3e-4,
    "validate.every": 0,
    "validate.batches": 1,
    "checkpoint.every": 0,
}
AT_ONCE = {f"guard.memory.{level}_seconds": 0 for level in ("yellow", "red", "green")}


def test_pressure_leaves_the_course_as_it_was(start: Start) -> None:
    """Yellow and red, injected: the cache goes, the micro-batch shrinks, the run pauses, goes on; the losses stay."""
    machine = Script(Y, Y, R, R, G, Y, G)
    ride = start(machine=machine, **LONGER, **AT_ONCE)
    ride.until_step(5)
    machine.begins.set()
    paused = ride.until(lambda event: isinstance(event, StateChanged) and event.state is State.PAUSED)
    assert isinstance(paused, StateChanged) and "memory pressure was red" in paused.reason
    assert ride.end().exit_code == ExitCode.OK
    texts = [event.text for event in ride.events if isinstance(event, Alarm | Notice)]
    kinds = ("cache cleared", "batch 4 → 2", "pausing until it is green", "batch 2 → 1", "going on", "cache cleared")
    assert [next(kind for kind in kinds if kind in text) for text in texts] == list(kinds)
    assert {alarm.guard for alarm in ride.of(Alarm)} == {"memory"}
    steps = ride.of(StepCompleted)
    assert {step.metrics["micro_batch_size"] for step in steps} >= {4, 1}
    held_at = next(event.step for event in ride.of(CheckpointSaved))
    assert held_at < 60, "a checkpoint before the pause"

    calm = start(machine=Script(G), **LONGER)
    assert calm.end().exit_code == ExitCode.OK
    assert not calm.of(Alarm)
    assert equal(ride.run, calm.run)
    stored = ride.run.readings()
    assert [reading.level for reading in stored if reading.level is not G] == [Y, Y, R, R, Y]
    assert stored == ride.of(Reading)[: len(stored)]


def test_red_pressure_stops_where_the_profile_says_so(start: Start) -> None:
    machine = Script(R)
    ride = start(machine=machine, **LONGER, **AT_ONCE, **{"guard.memory.on_red": "stop"})
    ride.until_step(5)
    machine.begins.set()
    ended = ride.end()
    assert (ended.state, ended.exit_code) == (State.STOPPED, ExitCode.MEMORY)
    assert list_checkpoints(ride.run)[-1].step == ended.step > 0


def test_the_owner_overrules_a_guard_that_holds(start: Start) -> None:
    machine = Script(R)
    ride = start(machine=machine, **LONGER, **AT_ONCE | {"guard.memory.red_seconds": 0.3})
    machine.begins.set()
    ride.until(lambda event: isinstance(event, StateChanged) and event.state is State.PAUSED)
    ride.send(Resume())
    held_at = ride.of(StepCompleted)[-1].step if ride.of(StepCompleted) else 0
    ride.until_step(held_at + 20)
    ride.send(Stop())
    assert ride.end().state is State.STOPPED
    assert len([event for event in ride.of(StateChanged) if event.state is State.PAUSED]) == 1, "not again for this red"


def test_who_only_leaves_does_not_overrule_a_guard(start: Start) -> None:
    machine = Script(R, R, R, R, R, R, R, R, R, R, G)
    ride = start(machine=machine, **LONGER, **AT_ONCE)
    machine.begins.set()
    ride.until(lambda event: isinstance(event, StateChanged) and event.state is State.PAUSED)
    ride.send(Resume(overrule=False))
    ride.until(lambda event: isinstance(event, Notice) and "going on" in event.text)
    ride.send(Stop())
    ride.end()


WILD = {
    "train.steps": 150,
    "train.schedule": "constant",
    "checkpoint.every": 5,
    "checkpoint.keep": 100,
    "guard.divergence.window_steps": 32,
    "validate.every": 0,
    "validate.batches": 1,
}


def run_wild(start: Start, rate: float, **guard: object) -> Ride:
    """A run whose learning rate becomes absurd at some step after the sixtieth."""
    ride = start(**WILD, **{f"guard.divergence.{name}": value for name, value in guard.items()})
    ride.until_step(60)
    ride.send(Set("train.learning_rate", str(rate)))
    return ride


def test_a_run_that_diverges_goes_back_and_learns_more_slowly(start: Start) -> None:
    ride = run_wild(start, 9.0, rollback_learning_rate=1e-3, rollbacks=3)
    ended = ride.end()
    assert ended.exit_code == ExitCode.OK, ended
    _, *later = ride.of(RunOpened)
    assert later, "it went back"
    amendments = ride.run.identity()["amendments"]
    set_at = next(entry["from_step"] for entry in amendments if entry["key"] == "train.learning_rate")
    back_at = [entry["from_step"] for entry in amendments if entry["key"] == "rollback"]
    assert [event.step for event in later] == back_at
    assert any("going back to step" in alarm.text and alarm.guard == "divergence" for alarm in ride.of(Alarm))
    rates = dict(zip(*(array.tolist() for array in ride.run.curve("learning_rate")), strict=True))
    assert rates[150] == pytest.approx(9.0 * 1e-3 ** len(back_at))
    assert rates[min(back_at)] == pytest.approx(3e-3)
    assert set_at >= 60
    assert [attempt.state for attempt in ride.run.attempts()] == ["stopped"] * len(later) + ["finished"]
    assert losses(ride.run)[-1] < losses(ride.run)[0]


def test_a_run_that_diverges_for_good_stops(start: Start) -> None:
    ride = run_wild(start, 9.0, rollback_learning_rate=1, rollbacks=1)
    ended = ride.end()
    assert (ended.state, ended.exit_code) == (State.FAILED, ExitCode.DIVERGED)
    assert "training diverged" in ended.reason and "after going back once" in ended.reason
    for checkpoint in list_checkpoints(ride.run):
        assert all(np.isfinite(array).all() for array in weights(checkpoint).values())


def test_a_loss_that_is_no_number_never_reaches_the_weights(start: Start, tmp_path: Path) -> None:
    """Weights so large that the loss overflows, though they are finite: none of the steps is applied, exit code 4."""
    ride = start(**{"train.steps": 4})
    ride.end()
    folder = tmp_path / "overflowing"
    folder.mkdir()
    for file in list_checkpoints(ride.run)[-1].path.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    huge = {name: array * 1e30 for name, array in weights(list_checkpoints(ride.run)[-1]).items()}
    mx.save_safetensors(str(folder / "model.safetensors"), {name: mx.array(array) for name, array in huge.items()})

    diverged = start(**{"model.init_from": str(folder), "train.steps": 50})
    ended = diverged.end()
    assert (ended.state, ended.exit_code, ended.step) == (State.FAILED, ExitCode.DIVERGED, 3)
    assert "3 steps in a row" in ended.reason
    assert len([alarm for alarm in diverged.of(Alarm) if "was not applied" in alarm.text]) == 2
    assert same(weights(list_checkpoints(diverged.run)[-1]), huge)
    norms = diverged.run.curve("grad_norm")[1]
    assert len(norms) == 3 and not np.any(np.isfinite(norms) & np.isfinite(losses(diverged.run)))


def test_a_setting_that_was_changed_is_changed_again_on_resume(start: Start) -> None:
    """Killed after the change and before a checkpoint: the steps are done again, with the same rates."""
    ride = start(**WILD | {"checkpoint.every": 50})
    ride.until_step(60)
    ride.send(Set("train.learning_rate", "1e-3"))
    ride.send(Set("train.batch_size", "4"))
    ride.send(Set("train.learning_rate", "fast"))
    ride.send(Set("train.micro_batch_size", "auto"))
    notice = ride.until(lambda event: isinstance(event, Notice) and "learning_rate" in event.text)
    assert isinstance(notice, Notice) and "train.learning_rate = 1e-3 from step" in notice.text
    ride.until_step(80)
    ride.send(Stop(checkpoint=False))
    ride.end()
    assert not ride.of(Alarm)
    refused = [event.text for event in ride.of(Notice) if event.text.startswith("not changed: ")]
    assert "train.batch_size cannot be changed" in refused[0] and "should be a number" in refused[1]
    assert "give a number" in refused[2]
    before = dict(zip(*(array.tolist() for array in ride.run.curve("loss")), strict=True))
    rates = dict(zip(*(array.tolist() for array in ride.run.curve("learning_rate")), strict=True))
    assert rates[50] == 3e-3 and rates[80] == 1e-3

    again = start(resume=ride.run, **WILD | {"checkpoint.every": 50, "train.steps": 80})
    assert again.of(RunOpened) == [] and again.end().exit_code == ExitCode.OK
    assert again.of(RunOpened)[0].step == 50
    after = dict(zip(*(array.tolist() for array in ride.run.curve("loss")), strict=True))
    assert [after[step] for step in range(1, 81)] == [before[step] for step in range(1, 81)]

    earlier = start(resume=ride.run, which="50", **WILD | {"train.steps": 80})
    assert earlier.end().exit_code == ExitCode.OK
    assert ride.run.curve("learning_rate")[1][-1] == 3e-3, "who goes back by hand takes another course"


def test_memory_that_runs_out_while_it_goes_back(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights are those of neither place then: the run takes a checkpoint again, and nothing false is saved."""
    ride = run_wild(start, 9.0, rollback_learning_rate=1e-3, rollbacks=3)
    evaluate, fired = mx.eval, threading.Event()

    def fail(*arrays: object) -> None:
        if sys._getframe(1).f_code.co_name == "restore" and not fired.is_set():
            fired.set()
            raise RuntimeError(NO_MEMORY)
        evaluate(*arrays)

    monkeypatch.setattr(mx, "eval", fail)
    ended = ride.end()
    monkeypatch.undo()
    assert fired.is_set() and ended.exit_code == ExitCode.OK, ended
    for checkpoint in list_checkpoints(ride.run):
        steps = int(checkpoint.optimizer_state()["step"].item())  # skipped ones are not counted
        assert checkpoint.step - 12 <= steps <= checkpoint.step, checkpoint


@pytest.mark.parametrize(
    "words",
    [
        "[METAL] Command buffer execution failed: Insufficient Memory (00000008:kIOGPUCommandBuffer…ErrorOutOfMemory)",
        "[metal::malloc] Unable to allocate 123 bytes.",
        "cudaMallocAsync(&data, size, stream) failed: out of memory",
        "std::bad_alloc: out of memory",
    ],
)
def test_all_backends_words_for_it_are_known(words: str) -> None:
    assert is_out_of_memory(RuntimeError(words))
    assert not is_out_of_memory(RuntimeError("cublasLt failed with code: 15"))


def test_limits_are_of_the_clock_and_not_of_a_step(start: Start) -> None:
    """One that was set while it trained holds after a resume, is lifted by `none`, and is never met at once."""
    ride = start(**WILD | {"train.steps": 100_000, "checkpoint.every": 50})
    ride.until_step(60)
    ride.send(Set("guard.max_hours", str(2 / 3600)))
    ride.send(Set("guard.stop_at", time.strftime("%H:%M", time.localtime(time.time() - 3600))))
    ride.until(lambda event: isinstance(event, Notice) and "stop_at" in event.text)
    ride.send(Stop())
    ride.end()
    again = start(resume=ride.run, **WILD | {"train.steps": 100_000})
    ended = again.end()
    assert "guard.max_hours" in ended.reason, ended
    lifted = start(resume=ride.run, **WILD | {"train.steps": 100_000})
    lifted.send(Set("guard.max_hours", "none"))
    lifted.send(Set("guard.max_hours", "soon"))
    lifted.until(lambda event: isinstance(event, Notice) and "should be a number" in event.text)
    time.sleep(2.5)
    assert lifted.engine.ended is None
    lifted.send(Stop())
    lifted.end()


def test_what_was_changed_on_another_course_cannot_break_this_one(start: Start) -> None:
    ride = start(**WILD | {"checkpoint.every": 50, "train.schedule": "cosine"})
    ride.until_step(60)
    ride.send(Set("train.final_learning_rate", "5e-4"))
    ride.until(lambda event: isinstance(event, Notice) and "final_learning_rate" in event.text)
    ride.send(Stop(checkpoint=False))
    ride.end()
    again = start(resume=ride.run, **WILD | {"train.schedule": "cosine"})
    again.until(lambda event: isinstance(event, RunOpened))
    again.send(Set("train.learning_rate", "1e-4"))
    again.end()
    assert again.engine.ended is not None and again.engine.ended.exit_code == ExitCode.OK


def test_a_silent_run_is_told_of_while_it_hangs(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    ride = start(**WILD | {"train.steps": 100_000, "guard.hang_seconds": 0.5, "guard.hang_factor": 2})
    ride.until_step(5)
    evaluate, stuck, freed = mx.eval, threading.Event(), threading.Event()

    def hang(*arrays: object) -> None:
        if threading.current_thread().name.startswith("engine of") and not freed.is_set():
            stuck.set()
            freed.wait(30)
        evaluate(*arrays)

    monkeypatch.setattr(mx, "eval", hang)
    assert stuck.wait(10)
    try:
        alarm = ride.until(lambda event: isinstance(event, Alarm) and event.guard == "hang")
        assert "no progress" in ride.run.log_path.read_text(encoding="utf-8"), "the log has it at once"
    finally:
        freed.set()
    assert isinstance(alarm, Alarm) and "no progress for" in alarm.text
    ride.until(lambda event: isinstance(event, Notice) and "it goes on" in event.text)
    ride.send(Stop())
    ride.end()
    assert [event["text"] for event in ride.run.events() if event["event"] == "alarm"] == [alarm.text]


def test_a_run_ends_when_its_time_is_over(start: Start) -> None:
    began = time.monotonic()
    ride = start(**WILD | {"train.steps": 100_000, "guard.max_hours": 1 / 3600})
    ended = ride.end()
    assert time.monotonic() - began < 20
    assert (ended.state, ended.exit_code) == (State.STOPPED, ExitCode.OK) and "guard.max_hours" in ended.reason
    assert list_checkpoints(ride.run)[-1].step == ended.step


def test_a_run_ends_when_it_learns_nothing_more(start: Start) -> None:
    settings: dict[str, object] = {
        "train.steps": 1000,
        "train.learning_rate": 1e-9,
        "validate.every": 2,
        "guard.early_stopping.patience": 3,
        "guard.early_stopping.least_improvement": 0.01,
    }
    ride = start(**settings)
    ended = ride.end()
    assert (ended.state, ended.exit_code, ended.step) == (State.STOPPED, ExitCode.OK, 8)
    assert "has not become better in 3 validations" in ended.reason
    scores: Sequence[float] = [checkpoint.state()["val_loss"] for checkpoint in list_checkpoints(ride.run)]
    assert min(scores) == ride.run.curve("val_loss")[1].min(), "the best is kept"
