"""A whole run through the engine: what it says and stores, and that nothing one does beside it changes its course."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from ride import Start, losses, same, weights

from engine.answers import Answers
from engine.checkpoint import best_checkpoint, list_checkpoints
from engine.commands import CancelGeneration, Checkpoint, Generate, Pause, Resume, Stop, Validate
from engine.environment import environment
from engine.errors import ExitCode
from engine.events import (
    Alarm,
    AnswerEnded,
    AnswerStarted,
    AnswerText,
    CheckpointSaved,
    Event,
    Notice,
    RunOpened,
    State,
    StateChanged,
    StepCompleted,
    Validated,
)
from engine.profile import Profile
from engine.runs import create_run
from engine.store import RunDirectory
from engine.worker import Engine, Mailbox


def test_a_run_from_beginning_to_end(start: Start) -> None:
    ride = start()
    ended = ride.end()
    assert (ended.state, ended.exit_code, ended.step) == (State.FINISHED, ExitCode.OK, 12)
    (opened,) = ride.of(RunOpened)
    assert (opened.step, opened.total_steps, opened.attempt, opened.dtype) == (0, 12, 1, "float32")
    steps = ride.of(StepCompleted)
    assert [event.step for event in steps] == list(range(1, 13))
    assert [event.metrics["trained_tokens"] for event in steps] == [8 * 32 * step for step in range(1, 13)]
    assert all(math.isfinite(value) for event in steps for value in event.metrics.values())
    assert steps[-1].remaining_seconds == 0
    assert [event.step for event in ride.of(Validated)] == [5, 10, 12]
    assert ride.events[-1] == ended

    run = ride.run
    assert losses(run) == [event.metrics["loss"] for event in steps]
    assert losses(run)[-1] < losses(run)[0] - 0.2
    for event in ride.of(Validated):
        assert math.log(event.metrics["val_perplexity"]) == pytest.approx(event.metrics["val_loss"])
        assert event.metrics["val_bits_per_byte"] < event.metrics["val_loss"] / math.log(2)
    summary = run.summary()
    assert (summary.state, summary.step, summary.total_steps, summary.live) == ("finished", 12, 12, False)
    log = run.log_path.read_text(encoding="utf-8")
    assert "Iter 10: Train loss" in log and "Grad norm" in log and "finished at step 12" in log
    # The last two, and the best, which is the last one here.
    assert [checkpoint.step for checkpoint in list_checkpoints(run)] == [10, 12]
    for checkpoint in list_checkpoints(run):
        checkpoint.verify()


def test_nothing_beside_training_changes_it(start: Start) -> None:
    """Chats, greedy and sampled, validations, pauses and checkpoints: the same losses, and weights, bit for bit."""
    alone = start(**{"train.steps": 40})
    alone.end()

    ride = start(**{"train.steps": 40})
    ride.until_step(2)
    ride.send(Generate("greedy", "The with statement", max_tokens=400, temperature=0.0))
    ride.send(Generate("sampled", "Compound statements", max_tokens=400, temperature=1.0, seed=7))
    ride.until_step(6)
    ride.send(Validate())
    ride.send(Pause())
    ride.until(lambda event: isinstance(event, StateChanged) and event.state is State.PAUSED)
    ride.send(Generate("paused", "While", max_tokens=20))
    ride.send(Checkpoint())
    ride.send(Validate())
    ride.until(lambda event: isinstance(event, AnswerEnded) and event.answer == "paused")
    ride.until(lambda event: isinstance(event, CheckpointSaved))
    ride.send(Resume())
    ride.until_step(20)
    ride.send(Checkpoint())
    ride.send(Generate("late", "Lambda", max_tokens=5, temperature=0.3))
    ride.end()
    assert losses(ride.run) == losses(alone.run)
    assert same(weights(list_checkpoints(ride.run)[-1]), weights(list_checkpoints(alone.run)[-1]))
    assert {event.answer for event in ride.of(AnswerEnded)} == {"greedy", "sampled", "paused", "late"}


def test_a_chat_streams_while_training_goes_on(start: Start) -> None:
    ride = start(**{"train.steps": 100_000})
    ride.until_step(3)
    for seed in range(20):  # a model that has learnt so little may end a text at any token
        ride.send(Generate(f"chat {seed}", "The import statement", max_tokens=500, temperature=0.8, seed=seed))
        ended = ride.until(lambda event: isinstance(event, AnswerEnded))
        assert isinstance(ended, AnswerEnded)
        assert ended.reason == ("length" if ended.tokens == 500 else "end of text")
        if ended.tokens > 100:
            break
        ride.events.clear()
    begun = next(i for i, event in enumerate(ride.events) if isinstance(event, AnswerStarted))
    over = ride.events.index(ended)
    pieces = [i for i, event in enumerate(ride.events) if isinstance(event, AnswerText)]
    steps = [i for i, event in enumerate(ride.events) if isinstance(event, StepCompleted) and begun < i < over]
    assert len(steps) >= 2 and min(pieces) < steps[-1] and max(pieces) > steps[-2]
    # A token for every micro-batch at least; a step has two of them. The prompt takes some, incomplete characters few.
    assert ended.tokens >= 2 * len(steps) - 4


def test_a_cancelled_answer_stops_and_the_others_go_on(start: Start) -> None:
    ride = start(**{"train.steps": 100_000, "model.vocab_size": 280})
    ride.until_step(3)
    ride.send(Pause())
    for answer in ("first", "second"):
        ride.send(Generate(answer, "x", max_tokens=100_000, temperature=2.0, top_p=1.0, seed=3))
    ride.until(lambda event: isinstance(event, AnswerText) and event.answer == "second")
    ride.send(CancelGeneration("first"))
    cancelled = ride.until(lambda event: isinstance(event, AnswerEnded) and event.answer == "first")
    assert isinstance(cancelled, AnswerEnded) and cancelled.reason in ("cancelled", "end of text")
    ride.send(Stop(checkpoint=False))
    ride.end()
    assert {event.reason for event in ride.of(AnswerEnded)} <= {"cancelled", "run ended", "end of text"}
    assert not list_checkpoints(ride.run)


def test_two_answers_at_once_and_the_others_in_turn(start: Start) -> None:
    ride = start(**{"train.steps": 100_000})
    ride.until_step(3)
    ride.send(Pause())
    for answer, max_tokens in (("a", 30), ("b", 10_000), ("c", 5), ("d", 5), ("e", 5)):
        ride.send(Generate(answer, "The", max_tokens=max_tokens, temperature=5.0, top_p=1.0))
    ride.send(CancelGeneration("d"))
    ride.until(lambda event: isinstance(event, AnswerEnded) and event.answer == "a")
    ride.send(Resume())
    step = ride.of(StepCompleted)[-1].step
    ride.until(lambda event: isinstance(event, AnswerEnded) and event.answer == "e")
    ride.send(Stop(checkpoint=False))
    ride.end()
    chat = [event for event in ride.events if isinstance(event, AnswerStarted | AnswerEnded)]
    open_now, most = set(), 0
    for event in chat:
        (open_now.add if isinstance(event, AnswerStarted) else open_now.discard)(event.answer)
        most = max(most, len(open_now))
    assert most == 2 and not open_now
    assert [event.answer for event in ride.of(AnswerStarted)] == ["a", "b", "c", "e"]
    assert all(event.step >= step for event in ride.of(AnswerStarted))
    ends = {event.answer: event for event in ride.of(AnswerEnded)}
    assert ends.keys() == {"a", "b", "c", "d", "e"}
    assert (ends["d"].reason, ends["d"].tokens) == ("cancelled", 0)


def test_answers_share_what_training_spares() -> None:
    """However many chats there are: each of those open gets its token, and the rest of the budget is for all."""
    said: list[Event] = []
    answers = Answers(Slow(), said.append, lambda: (None, 7))  # type: ignore[arg-type]
    for answer in "abcd":
        answers.ask(Generate(answer, ""))
    texts = lambda: [event.answer for event in said if isinstance(event, AnswerText)]  # noqa: E731
    answers.serve(0.0)
    assert texts() == ["a", "b"]
    answers.serve(2.5 * Slow.TOKEN_SECONDS)
    assert texts() == ["a", "b", "a", "b", "a"]
    answers.serve(0.0)
    assert texts()[5:] == ["b", "a"]


class Slow:
    """A task that only answers, at a known speed."""

    TOKEN_SECONDS = 0.02

    def answer(self, parameters: object, ask: Generate) -> Iterator[str]:
        while True:
            time.sleep(self.TOKEN_SECONDS)
            yield "word"


def test_a_question_that_nobody_heard_is_ended_with_the_run(
    tiny_profile: Callable[..., Profile], tmp_path: Path
) -> None:
    profile = tiny_profile(**{"data.files": "nowhere.txt"})
    engine = Engine(create_run(tmp_path / "runs", "tiny", {"environment": environment()}), profile)
    mailbox = engine.subscribe()
    engine.send(Generate("early", "The"))
    engine.start()
    ended = engine.join(60)
    assert ended is not None and ended.exit_code == ExitCode.BAD_INPUT
    *_, answer, last = mailbox.take()
    assert isinstance(answer, AnswerEnded) and (answer.answer, answer.reason) == ("early", "run ended")
    assert last == ended


def test_an_engine_whose_libraries_cannot_be_loaded_ends(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "engine.trainer", None)
    ride = start()
    ended = ride.end()
    assert (ended.state, ended.exit_code) == (State.FAILED, ExitCode.DEFECT)
    assert "engine.trainer" in ended.reason and ride.events == [ended]


def test_an_answer_keeps_the_weights_that_it_began_with(start: Start) -> None:
    """While training at a violent rate, a greedy answer is the one that the paused weights give."""
    ride = start(**{"train.steps": 100_000, "train.learning_rate": 0.05, "train.batch_size": 4})
    ride.until_step(3)
    ride.send(Pause())
    ride.until(lambda event: isinstance(event, StateChanged) and event.state is State.PAUSED)
    ask = {"prompt": "The with statement", "max_tokens": 60, "temperature": 0.0}
    ride.send(Generate("still", **ask))
    ride.until(lambda event: isinstance(event, AnswerEnded))
    ride.send(Generate("moving", **ask))
    ride.until(lambda event: isinstance(event, AnswerStarted) and event.answer == "moving")
    ride.send(Resume())
    ride.until(lambda event: isinstance(event, AnswerEnded) and event.answer == "moving")

    def text(answer: str) -> str:
        return "".join(event.text for event in ride.of(AnswerText) if event.answer == answer)

    assert text("moving") == text("still") != ""


def test_stopping_and_resuming_changes_nothing(start: Start) -> None:
    alone = start(**{"train.steps": 30})
    alone.end()

    ride = start(**{"train.steps": 30})
    ride.until_step(7)
    ride.send(Stop(reason="enough for today"))
    ended = ride.end()
    assert (ended.state, ended.reason, ended.exit_code) == (State.STOPPED, "enough for today", ExitCode.OK)
    run, stopped_at = ride.run, ended.step
    assert run.summary().state == "stopped"
    assert list_checkpoints(run)[-1].step == stopped_at < 30

    again = start(resume=run, **{"train.steps": 30})
    again.until_step(stopped_at + 3)
    again.send(Stop())
    again.end()
    last = start(resume=run, **{"train.steps": 30})
    assert last.end().state is State.FINISHED
    assert losses(run) == losses(alone.run)
    assert same(weights(list_checkpoints(run)[-1]), weights(list_checkpoints(alone.run)[-1]))
    elapsed = run.curve("elapsed_seconds")[1]
    assert np.all(np.diff(elapsed) > 0)
    assert [attempt.id for attempt in run.attempts()] == [1, 2, 3]
    assert not ride.of(Alarm) and not again.of(Alarm)


def test_resuming_a_finished_run_has_nothing_to_do(start: Start) -> None:
    ride = start()
    ride.end()
    again = start(resume=ride.run)
    ended = again.end()
    assert (ended.state, ended.exit_code, ended.step) == (State.FINISHED, ExitCode.OK, 12)
    assert not again.of(StepCompleted)
    assert len(losses(ride.run)) == 12


def test_going_back_to_a_step_keeps_the_old_rows(start: Start) -> None:
    ride = start()
    ride.end()
    first = losses(ride.run)
    back = start(resume=ride.run, which="10", **{"train.learning_rate": 1e-4, "train.warmup_steps": 0})
    assert back.end().state is State.FINISHED
    again = losses(ride.run)
    assert again[:10] == first[:10] and len(again) == 12
    assert again[11] != first[11]
    with ride.run.reader() as database:
        assert database is not None
        rows = "SELECT count(*) FROM value JOIN metric ON id = metric WHERE name = 'loss'"
        assert database.execute(rows).fetchone()[0] == 14
    names = [checkpoint.path.name for checkpoint in list_checkpoints(ride.run)]
    assert names == ["step-0000010", "step-0000012.a2"]


def test_a_best_that_was_saved_before_it_was_validated_is_kept(start: Start) -> None:
    ride = start(**{"train.steps": 40, "validate.every": 0, "checkpoint.every": 0, "checkpoint.keep": 1})
    ride.until_step(3)
    ride.send(Pause())
    ride.until(lambda event: isinstance(event, StateChanged) and event.state is State.PAUSED)
    ride.send(Checkpoint())
    ride.until(lambda event: isinstance(event, CheckpointSaved))
    ride.send(Validate())
    validated = ride.until(lambda event: isinstance(event, Validated))
    assert isinstance(validated, Validated) and validated.best
    ride.send(Stop())
    ride.end()
    (saved,) = list_checkpoints(ride.run)
    assert saved.verify()["val_loss"] == validated.metrics["val_loss"]

    again = start(resume=ride.run, **{"train.steps": 40, "validate.every": 0, "checkpoint.every": 5})
    again.until_step(saved.step + 12)
    again.send(Stop())
    again.end()
    assert not again.of(Validated)
    assert best_checkpoint(list_checkpoints(ride.run)) == saved


def test_going_on_from_the_best_checkpoint(start: Start) -> None:
    """A violent rate makes the later ones worse than an early one."""
    settings = {"train.steps": 12, "train.learning_rate": 0.5, "train.warmup_steps": 12, "validate.every": 1}
    ride = start(**settings, **{"checkpoint.every": 1, "checkpoint.keep": 12})
    ride.end()
    best = min(ride.of(Validated), key=lambda event: event.metrics["val_loss"]).step
    assert best < 12
    back = start(resume=ride.run, which="best", **settings)
    back.end()
    assert back.of(RunOpened)[0].step == best
    assert back.of(StepCompleted)[0].step == best + 1


def test_a_checkpoint_is_written_after_some_time(start: Start) -> None:
    ride = start(
        **{"train.steps": 100_000, "validate.every": 0, "checkpoint.every": 0, "checkpoint.every_minutes": 0.2 / 60}
    )
    saved = [ride.until(lambda event: isinstance(event, CheckpointSaved))]
    ride.events.clear()
    saved.append(ride.until(lambda event: isinstance(event, CheckpointSaved)))
    assert saved[1].time - saved[0].time > 0.2


# Validations that take a while, so that there is time to interrupt them.
SLOW = {"train.steps": 6, "validate.every": 4, "validate.batches": 150, "train.micro_batch_size": 1}
SLOW |= {"train.sequence_length": 8, "data.heldout_fraction": 0.5}


def is_validating(event: Event) -> bool:
    return isinstance(event, StateChanged) and event.state is State.VALIDATING


def val_losses(run: RunDirectory) -> list[tuple[int, float]]:
    steps, values = run.curve("val_loss")
    return list(zip(steps.tolist(), values.tolist(), strict=True))


def test_a_validation_that_a_stop_cut_short_is_made_up_for(start: Start) -> None:
    alone = start(**SLOW)
    alone.end()
    assert [step for step, _ in val_losses(alone.run)] == [4, 6]

    ride = start(**SLOW)
    run = ride.run
    for step in (4, 6):
        ride.until(is_validating)
        ride.send(Stop())
        ended = ride.end()
        assert (ended.state, ended.step) == (State.STOPPED, step)
        assert step not in [step for step, _ in val_losses(run)]
        ride = start(resume=run, **SLOW)
        ride.until(lambda event: isinstance(event, Validated))
        ride.events.clear()
    assert ride.end().state is State.FINISHED
    assert val_losses(run) == val_losses(alone.run)
    assert losses(run) == losses(alone.run)
    assert start(resume=run, **SLOW).end().state is State.FINISHED


def test_a_pause_holds_a_validation(start: Start) -> None:
    ride = start(**SLOW)
    ride.until(is_validating)
    ride.send(Pause())
    ride.until(lambda event: isinstance(event, StateChanged) and event.state is State.PAUSED)
    ride.send(Generate("meanwhile", "While", max_tokens=3))
    ride.until(lambda event: isinstance(event, AnswerEnded))
    assert not ride.of(Validated)
    ride.send(Resume())
    ride.until(lambda event: isinstance(event, Validated))
    assert ride.end().state is State.FINISHED
    states = [event.state for event in ride.of(StateChanged)]
    assert states[:6] == [
        *(State.LOADING, State.TRAINING, State.VALIDATING, State.PAUSED, State.VALIDATING, State.TRAINING)
    ]
    assert [event.step for event in ride.of(Validated)] == [4, 6]


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "state"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(start: Start, damage: str) -> None:
    ride = start()
    ride.end()
    expected = losses(ride.run)
    newest = list_checkpoints(ride.run)[-1].path
    broken = newest / ("state.json" if damage == "state" else "optimizer.safetensors")
    content = broken.read_bytes()
    if damage == "remove":
        broken.unlink()
    elif damage == "flip":
        middle = len(content) // 2
        broken.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    else:
        broken.write_bytes(content[: len(content) // 2])
    again = start(resume=ride.run)
    assert again.end().exit_code == ExitCode.OK
    (alarm,) = again.of(Alarm)
    assert "step-0000012" in alarm.text and broken.name in alarm.text and "falling back" in alarm.text
    assert again.of(RunOpened)[0].step == 10
    assert losses(ride.run) == expected
    assert list_checkpoints(ride.run)[-1].path.name == "step-0000012.a2"

    asked = start(resume=ride.run, which="10")
    assert asked.end().exit_code == ExitCode.OK
    missing = start(resume=ride.run, which="7")
    ended = missing.end()
    assert ended.exit_code == ExitCode.BAD_INPUT
    assert "no checkpoint '7'" in ended.reason and "\n" not in ended.reason


def test_without_any_intact_checkpoint_it_is_refused(start: Start) -> None:
    """Beginning again would delete what may still be worth saving."""
    ride = start()
    ride.end()
    for checkpoint in list_checkpoints(ride.run):
        (checkpoint.path / "model.safetensors").write_bytes(b"")
    ended = start(resume=ride.run).end()
    assert ended.exit_code == ExitCode.BAD_INPUT
    assert "none of its 2 checkpoints is intact" in ended.reason and "\n" not in ended.reason
    assert [checkpoint.step for checkpoint in list_checkpoints(ride.run)] == [10, 12]


def test_before_the_first_step_there_is_nothing_to_save(start: Start) -> None:
    ride = start()
    ride.send(Stop())
    ended = ride.end()
    assert (ended.state, ended.step) == (State.STOPPED, 0)
    assert not list_checkpoints(ride.run)
    assert start(resume=ride.run).end().state is State.FINISHED


def test_other_data_are_refused(start: Start, tmp_path: Path) -> None:
    ride = start()
    ride.end()
    changed = next((tmp_path / "text").iterdir())
    changed.write_text("something else entirely. " * 400)
    ended = start(resume=ride.run).end()
    assert ended.exit_code == ExitCode.BAD_INPUT
    assert "data or base are not those" in ended.reason and "\n" not in ended.reason


def test_another_environment_is_a_warning(start: Start) -> None:
    ride = start()
    ride.end()
    identity = ride.run.identity()
    ride.run.update_identity(environment=identity["environment"] | {"blas_threads": "77"})
    again = start(resume=ride.run, which="10")
    assert again.end().exit_code == ExitCode.OK
    (alarm,) = again.of(Alarm)
    assert "blas_threads was 77" in alarm.text


def test_a_full_disk_is_an_alarm_and_training_goes_on(start: Start) -> None:
    """The limit on the size of a file makes the same system calls fail that a full disk does."""
    ride = start(**{"train.steps": 400, "validate.every": 0, "checkpoint.every": 20, "model.width": 64})
    saved = ride.until(lambda event: isinstance(event, CheckpointSaved))
    assert isinstance(saved, CheckpointSaved)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        alarm = ride.until(lambda event: isinstance(event, Alarm) and "checkpoint" in event.text)
        behind = ride.of(StepCompleted)[-1].step
        ride.until_step(behind + 5)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert isinstance(alarm, Alarm) and alarm.level == "critical"
    assert "could not be written" in alarm.text and "\n" not in alarm.text
    assert saved.step in [checkpoint.step for checkpoint in list_checkpoints(ride.run)]
    assert not list(ride.run.checkpoints_path.glob(".writing-*"))
    ride.send(Stop())
    ended = ride.end()
    assert ended.exit_code == ExitCode.OK
    assert list_checkpoints(ride.run)[-1].step == ended.step
    assert len(losses(ride.run)) == ended.step


def test_what_cannot_be_stored_is_kept_until_it_can(start: Start) -> None:
    ride = start(**{"train.steps": 200, "validate.every": 0, "checkpoint.every": 0})
    ride.until_step(5)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, hard))
    try:
        alarm = ride.until(lambda event: isinstance(event, Alarm))
        ride.until_step(ride.of(StepCompleted)[-1].step + 5)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert isinstance(alarm, Alarm) and "run.sqlite could not be written" in alarm.text
    ended = ride.end()
    assert ended.state is State.FINISHED
    assert len(losses(ride.run)) == 200
    assert [event.text for event in ride.of(Notice)] == ["run.sqlite could be written again; nothing was lost"]
    assert [event["text"] for event in ride.run.events() if event["event"] == "alarm"] == [alarm.text]


def test_a_disk_that_stays_full_ends_a_run_in_one_line(start: Start) -> None:
    ride = start(**{"train.steps": 400, "validate.every": 0, "checkpoint.every": 5})
    ride.until(lambda event: isinstance(event, CheckpointSaved))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, hard))
    try:
        ride.until(lambda event: isinstance(event, Alarm) and "run.sqlite" in event.text)
        ride.until_step(ride.of(StepCompleted)[-1].step + 5)
        ride.send(Stop(reason="enough"))
        ended = ride.end()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (ended.state, ended.exit_code) == (State.FAILED, ExitCode.BAD_INPUT)
    assert ended.reason.startswith("enough, but its last checkpoint could not be written") and "\n" not in ended.reason
    assert ride.events[-1] == ended
    assert "in memory is lost" in ride.of(Alarm)[-1].text

    again = start(resume=ride.run, **{"train.steps": 20, "validate.every": 0})
    assert again.end().state is State.FINISHED
    assert again.of(RunOpened)[0].step >= 5


def test_a_checkpoint_that_cannot_be_written_is_said_once(start: Start) -> None:
    """At the last step it is tried for the score, by the schedule and for the end."""
    ride = start(**{"train.steps": 400, "validate.every": 0, "validate.batches": 1, "checkpoint.every": 100})
    ride.until_step(5)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, hard))
    try:
        ended = ride.end()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert ended.exit_code == ExitCode.BAD_INPUT and "could not be written" in ended.reason
    said = [alarm.text.split(" could")[0] for alarm in ride.of(Alarm) if alarm.text.startswith("checkpoint of")]
    assert said == [f"checkpoint of step {step}" for step in (100, 200, 300, 400)]


@pytest.mark.parametrize("what", ["run", "checkpoint", "folder"])
def test_a_run_begins_with_the_weights_of_another(start: Start, tmp_path: Path, what: str) -> None:
    ride = start()
    ride.end()
    best = list_checkpoints(ride.run)[-1].path
    source = {"run": ride.run.name, "checkpoint": str(best), "folder": str(tmp_path / "elsewhere")}[what]
    if what == "folder":
        best.rename(source)
        (Path(source) / "state.json").unlink()
        (Path(source) / "optimizer.safetensors").unlink()
    tuned = start(**{"model.init_from": source, "train.steps": 1, "train.learning_rate": 1e-5})
    assert tuned.end().exit_code == ExitCode.OK
    assert losses(tuned.run)[0] < losses(ride.run)[0] - 0.2


def test_weights_that_do_not_fit_are_refused(start: Start) -> None:
    ride = start()
    ride.end()
    ended = start(**{"model.init_from": ride.run.name, "model.layers": 3}).end()
    assert ended.exit_code == ExitCode.BAD_INPUT and "layers = 2" in ended.reason and "layers = 3" in ended.reason
    ended = start(**{"model.init_from": "nowhere"}).end()
    assert ended.exit_code == ExitCode.BAD_INPUT and "'nowhere'" in ended.reason


def test_a_run_needs_the_weights_that_it_began_with_no_more(start: Start) -> None:
    ride = start()
    ride.end()
    settings = {"model.init_from": ride.run.name, "train.steps": 20, "checkpoint.every": 0, "validate.every": 0}
    alone = start(**settings)
    alone.end()
    tuned = start(**settings)
    tuned.until_step(3)
    tuned.send(Stop(checkpoint=False))
    assert tuned.end().step < 20
    ride.run.path.rename(ride.run.path.with_name("gone"))
    again = start(resume=tuned.run, **settings)
    assert again.end().exit_code == ExitCode.OK
    assert again.of(RunOpened)[0].step == 0
    assert losses(tuned.run) == losses(alone.run)


def test_a_slow_reader_loses_old_steps_and_nothing_else() -> None:
    mailbox = Mailbox()
    step = {"total_steps": 1, "metrics": {}, "elapsed_seconds": 0.0, "remaining_seconds": None}
    for number in range(20_000):
        mailbox.put(StepCompleted(step=number, **step))  # type: ignore[arg-type]
        if number % 1000 == 0:
            mailbox.put(Alarm(level="warning", text=str(number)))
    taken = mailbox.take()
    steps = [event.step for event in taken if isinstance(event, StepCompleted)]
    assert [event.text for event in taken if isinstance(event, Alarm)] == [str(n) for n in range(0, 20_000, 1000)]
    assert steps == list(range(20_000 - len(steps), 20_000)) and 4096 <= len(steps) <= 8192
    assert mailbox.take() == []
