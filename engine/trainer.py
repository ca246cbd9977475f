"""The training loop. It knows no kind of run, no screen and no socket: commands come in, events go out."""

from __future__ import annotations

import contextlib
import math
import time
import traceback
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from queue import SimpleQueue

import numpy as np

from engine.answers import Answers
from engine.backend import compute_dtype, device_words, memory_bytes, mx, on_gpu
from engine.checkpoint import (
    Checkpoint,
    CheckpointError,
    choose_checkpoint,
    latest_intact,
    list_checkpoints,
    newest_attempt,
    prune_checkpoints,
    save_checkpoint,
)
from engine.commands import Command
from engine.controls import Controls
from engine.environment import differences, environment
from engine.errors import ExitCode, UserError
from engine.events import Alarm, CheckpointSaved, Notice, RunOpened, State, StepCompleted, Validated
from engine.guards.divergence import DivergenceGuard, Verdict
from engine.journal import Journal
from engine.optimizer import learning_rate
from engine.profile import Profile
from engine.ranks import RankLost, Ranks
from engine.store import RunDirectory
from engine.tasks import make_task
from engine.update import Gradient, Update

from mlx.utils import tree_flatten

_PACE_WINDOW_STEPS = 100
CHAT_SHARE = 0.75
"""Time for open chats, as a part of what the micro-batch before took: with the rest of a step, training keeps half."""


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended."""

    state: State
    reason: str
    exit_code: ExitCode


@dataclass
class Progress:
    """What a checkpoint remembers beside weights and optimizer."""

    step: int = 0
    trained_tokens: int = 0
    elapsed_seconds: float = 0.0
    best_val_loss: float | None = None


class Trainer:
    """One attempt at a run, on the thread that owns MLX.

    Made, it is ready to train: data and model are loaded and a checkpoint is restored. `resume_from` is None for a new
    run, else `latest`, `best` or a step. Raises `UserError` for what the user can mend.
    """

    def __init__(
        self,
        run: RunDirectory,
        profile: Profile,
        ranks: Ranks,
        journal: Journal,
        inbox: SimpleQueue[Command],
        resume_from: str | None = None,
    ) -> None:
        if profile.train.batch_size % ranks.size:
            raise UserError(f"train.batch_size = {profile.train.batch_size} cannot be shared by {ranks.size} ranks")
        self._run, self._profile, self._ranks, self._journal = run, profile, ranks, journal
        checkpoint = self._find_checkpoint(resume_from) if resume_from and ranks.chief else None
        self._task = make_task(profile, run.path.parent, checkpoint.path if checkpoint else None)
        self._total_steps = self._task.total_steps()
        self._compare_ranks()
        self._dtype = compute_dtype(profile.train.dtype)
        self._update = Update(self._task, profile.train, ranks, self._dtype, compiled=on_gpu())
        self._answers = Answers(self._task, journal.say, lambda: (self._update.parameters, self.progress.step))
        self._controls = Controls(inbox, self._answers.ask, self._answers.cancel)
        self._guard = DivergenceGuard(profile.guard.divergence.skips + 1)
        self.progress = Progress()
        self._val_loss: tuple[int, float] | None = None
        self._validating = False
        self._saved: Checkpoint | None = None
        self._saved_at = time.monotonic()
        self._aside_seconds = self._paused_seconds = 0.0
        self._reported_at = time.monotonic()
        self._pace: deque[float] = deque(maxlen=_PACE_WINDOW_STEPS)
        self._open(checkpoint)

    def train(self) -> Outcome:
        """Trains until all steps are done, or a command or a guard ends it; leaves a checkpoint."""
        self._journal.enter(State.TRAINING)
        self._reported_at = time.monotonic()
        try:
            outcome = self._take_steps()
        except RankLost as error:  # in an exchange: weights and optimizer are those of the last completed step
            outcome = Outcome(State.FAILED, str(error), ExitCode.BAD_INPUT)
        except Exception as error:
            self._rescue(error)
            raise
        return self._close(outcome)

    def _take_steps(self) -> Outcome:
        outcome: Outcome | None = None
        while outcome is None:
            if self._ranks.chief and not self._controls.stop:
                self._keep_appointments()
            if self._ranks.any(self._controls.stop is not None):
                reason = self._controls.stop.reason if self._controls.stop else "another rank was asked to stop"
                outcome = Outcome(State.STOPPED, reason, ExitCode.OK)
            elif self.progress.step >= self._total_steps:
                outcome = Outcome(State.FINISHED, f"all {self._total_steps} steps are done", ExitCode.OK)
            else:
                outcome = self._take_step()
        return outcome

    def _take_step(self) -> Outcome | None:
        step, started = self.progress.step + 1, time.monotonic()
        self._aside_seconds = 0.0
        for number, batch in enumerate(self._task.micro_batches(step, self._ranks.rank, self._ranks.size)):
            busy = time.monotonic()
            mx.random.seed(_seed(self._profile.seed, step, number, self._ranks.rank))
            self._update.accumulate(batch)
            self._serve(time.monotonic() - busy)
            if self._controls.stop and self._ranks.size == 1:
                self._update.drop()  # done again, with the same numbers, when the run is resumed
                return None
        gradient = self._update.collect()
        rate = learning_rate(self._profile.train, step, self._total_steps)
        verdict = self._guard.judge(gradient.loss, gradient.norm)
        if verdict is Verdict.APPLY:
            self._update.apply(gradient, rate)
        self.progress.step = step
        self.progress.trained_tokens += gradient.tokens
        self._report(gradient, rate, time.monotonic() - started)
        if verdict is not Verdict.APPLY:
            self._warn(f"step {step}: loss {gradient.loss}, grad norm {gradient.norm}: the update was not applied")
        if verdict is Verdict.STOP:
            reason = f"training diverged: no finite loss or gradient for {self._guard.limit} steps in a row"
            return Outcome(State.FAILED, reason, ExitCode.DIVERGED)
        return None

    def _keep_appointments(self) -> None:
        """Validates and checkpoints the last completed step where it is time, and where that was cut short before."""
        step, last = self.progress.step, self.progress.step >= self._total_steps
        if last or _is_due(step, self._profile.validation.every):
            self._validate()
        settings, minutes = self._profile.checkpoint, (time.monotonic() - self._saved_at) / 60
        if _is_due(step, settings.every) or (settings.every_minutes and minutes >= settings.every_minutes):
            self._checkpoint()

    # Between micro-batches: chats, commands, pauses

    def _serve(self, busy_seconds: float) -> None:
        """Gives chats their share of the time, does what was asked, and waits while paused."""
        self._controls.listen()
        self._answers.serve(CHAT_SHARE * busy_seconds)
        self._do_errands()
        self._hold()

    def _hold(self) -> None:
        """Waits while paused; chats and errands are served meanwhile."""
        if not self._controls.paused or self._controls.stop:
            return
        state, paused_at = self._journal.state, time.monotonic()
        with self._aside():
            self._journal.enter(State.PAUSED)
            while self._controls.paused and not self._controls.stop:
                self._controls.listen(0.0 if self._answers else 0.5)
                self._answers.serve(0.0)
                self._do_errands()
            if not self._controls.stop:
                self._journal.enter(state)
        self._paused_seconds += time.monotonic() - paused_at

    @contextlib.contextmanager
    def _aside(self) -> Iterator[None]:
        """Time inside is not the step's; what is nested counts once."""
        before, started = self._aside_seconds, time.monotonic()
        try:
            yield
        finally:
            self._aside_seconds = before + time.monotonic() - started

    def _do_errands(self) -> None:
        step = self.progress.step
        if self._controls.validation_asked() and not self._validating:
            if self._val_loss and self._val_loss[0] == step:
                self._journal.say(Notice(text=f"step {step} has been validated already"))
            self._validate()
        if self._controls.checkpoint_asked():
            if self._saved_now:
                self._journal.say(Notice(text=f"step {step} has been saved already"))
            self._checkpoint()

    # What a step leaves behind

    def _report(self, gradient: Gradient, rate: float, step_seconds: float) -> None:
        now, progress = time.monotonic(), self.progress
        seconds = max(step_seconds - self._aside_seconds, 1e-9)
        self._pace.append(now - self._reported_at - self._paused_seconds)  # with validations and checkpoints
        self._reported_at, self._paused_seconds = now, 0.0
        progress.elapsed_seconds += seconds
        metrics = {
            "loss": gradient.loss,
            "grad_norm": gradient.norm,
            **{f"grad_norm/{part}": norm for part, norm in gradient.part_norms.items()},
            "learning_rate": rate,
            "steps_per_second": 1 / seconds,
            "tokens_per_second": gradient.tokens / seconds,
            "trained_tokens": progress.trained_tokens,
            "elapsed_seconds": progress.elapsed_seconds,
            **memory_bytes(),
        }
        self._journal.record(progress.step, {**metrics, "time": time.time()})
        left = self._total_steps - progress.step
        self._journal.say(
            StepCompleted(
                step=progress.step,
                total_steps=self._total_steps,
                metrics=metrics,
                elapsed_seconds=progress.elapsed_seconds,
                remaining_seconds=left * sum(self._pace) / len(self._pace),
            )
        )

    def _validate(self) -> None:
        """Measures the held-out loss of the last completed step, once; a stop cuts it short."""
        step = self.progress.step
        if self._val_loss and self._val_loss[0] == step:
            return
        with self._aside():
            metrics = self._heldout_metrics()
            if metrics is None:
                return
            loss = metrics["val_loss"]
            best = math.isfinite(loss) and loss < (self.progress.best_val_loss or math.inf)
            self._val_loss = (step, loss)
            self._journal.record(step, metrics)
            self._journal.say(Validated(step=step, metrics=metrics, best=best))
            if best:
                self.progress.best_val_loss = loss
            if best or self._saved_now:
                self._checkpoint()  # the best is always kept

    def _heldout_metrics(self) -> Mapping[str, float] | None:
        """None when it was stopped. Chats are served and pauses kept between micro-batches, as in training."""
        state, loss_sum, tokens = self._journal.state, 0.0, 0
        self._journal.enter(State.VALIDATING)
        self._validating = True
        for batch in islice(self._task.heldout(), self._profile.validation.batches or None):
            busy = time.monotonic()
            loss_sum += self._update.loss(batch)
            tokens += batch.tokens
            self._controls.listen()
            self._answers.serve(CHAT_SHARE * (time.monotonic() - busy))
            if state is not State.PAUSED:  # what was asked for in a pause is done in it
                self._hold()
            if self._controls.stop:
                return None
        self._validating = False
        self._journal.enter(state)
        return self._task.heldout_metrics(loss_sum, tokens)

    def _checkpoint(self) -> bool:
        """Saves the last completed step. A failure is an alarm, not an end: the checkpoints before it stay."""
        if not self._ranks.chief:
            return True
        try:
            with self._aside():
                self._save()
        except CheckpointError as error:
            self._warn(f"{error}; training goes on, the checkpoints before it are kept", "critical")
            return False
        finally:
            self._saved_at = time.monotonic()
        return True

    @property
    def _saved_now(self) -> bool:
        return self._saved is not None and self._saved.step == self.progress.step

    def _save(self) -> None:
        step, started = self.progress.step, time.monotonic()
        val_loss = self._val_loss[1] if self._val_loss and self._val_loss[0] == step else None
        state = {
            "progress": asdict(self.progress),
            "guard": {"nan_steps_in_a_row": self._guard.in_a_row},
            "micro_batch_size": self._profile.train.micro_batch_size,
            "val_loss": val_loss if val_loss is None or math.isfinite(val_loss) else None,
        }
        if self._saved is not None and self._saved.step == step:
            self._saved.note(**state)  # it may have been validated since
            return
        self._saved = save_checkpoint(
            self._run,
            step,
            self._journal.attempt,
            lambda folder: self._task.save(self._update.parameters, folder),
            self._update.optimizer_state(),
            state,
        )
        self._prune()
        seconds, size = time.monotonic() - started, self._saved.size_bytes()
        path = str(self._saved.path)
        self._journal.say(CheckpointSaved(step=step, path=path, size_bytes=size, seconds=seconds))

    def _prune(self) -> None:
        if not self._journal.stored:
            return  # what belongs to this attempt is known from the store
        try:
            prune_checkpoints(self._run, self._profile.checkpoint.keep)
        except UserError as error:
            self._warn(f"{error}; old checkpoints are kept meanwhile")

    # Opening and closing

    def _open(self, checkpoint: Checkpoint | None) -> None:
        if self._ranks.chief:
            self._check_identity()
        self._update.restore(self._task.initial_parameters(), checkpoint.optimizer_state() if checkpoint else None)
        if checkpoint is not None:
            state = checkpoint.state()
            self.progress = Progress(**state["progress"])
            self._guard.in_a_row = state["guard"]["nan_steps_in_a_row"]
            self._saved = checkpoint
            if state["val_loss"] is not None:
                self._val_loss = (checkpoint.step, state["val_loss"])
        self.progress.step = self._ranks.decide(self.progress.step)
        self._guard.in_a_row = self._ranks.decide(self._guard.in_a_row)
        self._update.agree()
        newest = newest_attempt(self._run) if self._ranks.chief else 0
        attempt = self._journal.begin_attempt(self.progress.step, self._total_steps, newest)
        self._journal.say(
            RunOpened(
                run=self._run.name,
                directory=str(self._run.path),
                task=self._profile.kind,
                device=device_words(),
                dtype=str(self._dtype).removeprefix("mlx.core."),
                parameters=sum(array.size for _, array in tree_flatten(self._update.parameters)),
                step=self.progress.step,
                total_steps=self._total_steps,
                attempt=attempt,
            )
        )
        if checkpoint is None and self._task.borrowed_weights:
            self._checkpoint()  # what they came from may change or vanish; the run needs it no more

    def _compare_ranks(self) -> None:
        """What the ranks must have in common, as each takes its share of the same batches."""
        if not self._ranks.same(self._task.data_digest):
            raise UserError("the ranks do not have the same data; copy one machine's data to the others")
        if not self._ranks.same(str(self._total_steps)):
            raise UserError("the ranks do not train for the same number of steps; give all of them the same profile")

    def _check_identity(self) -> None:
        identity = self._run.identity()
        recorded = identity.get("data_digest")
        if recorded is None:
            self._run.update_identity(data_digest=self._task.data_digest)
            return
        for difference in differences(identity.get("environment", {}), environment()):
            self._warn(f"{difference}: the losses may differ in their last digits from a run never interrupted")
        if recorded != self._task.data_digest:
            raise UserError(
                f"run {self._run.name}: its data are not those that it began with; bring them back, or start a new run"
            )

    def _find_checkpoint(self, which: str) -> Checkpoint | None:
        if which != "latest":
            return choose_checkpoint(self._run, which)
        checkpoints = list_checkpoints(self._run)
        if not checkpoints:
            self._journal.say(Notice(text="there is no checkpoint to resume from: starting again at step 0"))
            return None
        return latest_intact(self._run, checkpoints, self._warn)

    def _close(self, outcome: Outcome) -> Outcome:
        self._answers.end_all("run ended")
        if outcome.state is not State.FINISHED:
            self._journal.enter(State.STOPPING, outcome.reason)
        wanted = self._controls.stop is None or self._controls.stop.checkpoint
        begun = self.progress.step > 0  # before the first step there is nothing that the seed does not give again
        if not wanted or not begun or self._checkpoint():
            return outcome
        reason = f"{outcome.reason}, but its last checkpoint could not be written: resume goes on from the one before"
        return Outcome(State.FAILED, reason, outcome.exit_code or ExitCode.BAD_INPUT)

    def _rescue(self, error: Exception) -> None:
        """Saves the last completed step before a failure ends the run; only one inside the update spoils weights."""
        self._update.drop()
        traceback.clear_frames(error.__traceback__)  # their arrays may be what fills the memory
        with contextlib.suppress(Exception):  # the failure itself is what the user has to hear of
            self._answers.end_all("run ended")
            if self._update.intact:
                self._checkpoint()

    def _warn(self, text: str, level: str = "warning") -> None:
        self._journal.say(Alarm(level=level, text=text))


def _is_due(step: int, every: int) -> bool:
    return step > 0 and every > 0 and step % every == 0


def _seed(*parts: int) -> int:
    """One seed from several numbers, so that nothing that happened before can change it."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)
