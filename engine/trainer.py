"""The training loop. It knows no kind of run, no screen and no socket: commands come in, events go out."""

from __future__ import annotations

import contextlib
import math
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from queue import SimpleQueue

import numpy as np

from engine.amendments import LIMITS, Amendments, NotStoredError
from engine.answers import Answers
from engine.attending import Abandoned, Attendant
from engine.backend import (
    clear_cache,
    compute_dtype,
    device_words,
    forget_peak,
    is_out_of_memory,
    limit_memory,
    on_gpu,
)
from engine.checkpoint import Checkpoint, newest_attempt
from engine.commands import Command, Set
from engine.controls import Controls
from engine.errors import ExitCode, UserError
from engine.events import Alarm, Notice, RunOpened, State, Validated
from engine.guards import Action, ClearCache, End, Hold, LetGo, Shrink, Tell, Warn
from engine.guards.divergence import DivergenceGuard, Judgement, Verdict
from engine.guards.early_stopping import EarlyStopping
from engine.journal import Journal
from engine.loading import Interrupted, Loading
from engine.opening import (
    check_identity,
    compare_ranks,
    find_checkpoint,
    find_good_checkpoint,
    find_last_checkpoint,
)
from engine.optimizer import learning_rate
from engine.outcome import Outcome
from engine.oversight import Oversight
from engine.planner import plan, settle, suggest
from engine.planning.capacity import gigabytes
from engine.profile import Profile
from engine.ranks import RankLost, Ranks
from engine.reporting import Reporter
from engine.saving import Saver
from engine.scoring import Scorer
from engine.store import RunDirectory
from engine.tasks import make_task
from engine.update import Gradient, Update
from engine.vigil import Vigil

from mlx.utils import tree_flatten


@dataclass
class Progress:
    """What a checkpoint remembers beside weights, optimizer and guards."""

    step: int = 0
    trained_tokens: int = 0
    elapsed_seconds: float = 0.0
    best_val_loss: float | None = None
    loss_sum: float = 0.0
    """Over the `loss_steps` since the last validation."""
    loss_steps: int = 0


class Trainer:
    """One attempt at a run, on the thread that owns MLX.

    Made, it is ready to train: data and model are loaded and a checkpoint is restored. `resume_from` is None for a new
    run, else `latest`, `best` or a step. Raises `UserError` for what the user can mend, `Interrupted` where the run was
    asked to end meanwhile.
    """

    def __init__(
        self,
        run: RunDirectory,
        profile: Profile,
        ranks: Ranks,
        journal: Journal,
        inbox: SimpleQueue[Command],
        vigil: Vigil,
        resume_from: str | None = None,
    ) -> None:
        if profile.train.batch_size % ranks.size:
            raise UserError(f"train.batch_size = {profile.train.batch_size} cannot be shared by {ranks.size} ranks")
        self._run, self._profile, self._ranks, self._journal, self._vigil = run, profile, ranks, journal, vigil
        forget_peak()
        limit = profile.guard.memory.limit_gb
        limit_memory(int(limit * 1e9) if limit else None)
        checkpoint = None
        if resume_from and ranks.chief:
            checkpoint = find_checkpoint(run, resume_from, self._tell, self._warn)
        loading = Loading(journal.say, inbox if ranks.chief else None)
        try:
            self._task = make_task(profile, run.path.parent, checkpoint.path if checkpoint else None, loading)
        except Interrupted:
            for command in loading.heard():  # who asked something is told that the run has ended
                inbox.put(command)
            raise
        self._total_steps = self._task.total_steps()
        compare_ranks(ranks, self._task.data_digest, self._total_steps)
        self._dtype = compute_dtype(profile.train.dtype)
        self._update = Update(self._task, profile.train, ranks, self._dtype, compiled=on_gpu(), warn=self._warn)
        self._answers = Answers(self._task, journal.say, lambda: (self._update.parameters, self.progress.step))
        self._controls = Controls(inbox, self._answers.ask, self._answers.cancel)
        self._attendant = Attendant(journal, self._controls, self._answers, vigil.hang, self._do_errands)
        self._scorer = Scorer(self._task, self._update, journal, self._controls, self._attendant)
        self._saver = Saver(run, journal, self._task, self._update)
        self._divergence = DivergenceGuard(profile.guard.divergence)
        self._early_stopping = EarlyStopping(profile.guard.early_stopping)
        self._amendments = Amendments.of(profile, run if ranks.chief else None)
        self._oversight = Oversight(self._amendments.guard(), journal, vigil.kept)
        self.progress = Progress()
        self._val_loss: tuple[int, float] | None = None
        self._reporter = Reporter(journal, self._total_steps)
        if ranks.chief:
            check_identity(run, self._task.data_digest, self._warn)
        self._go_on_from(checkpoint)
        if checkpoint is not None and resume_from != "latest":
            self._try_to_amend(partial(self._amendments.forget_after, checkpoint.step))
        if profile.train.backward == "layerwise" and not self._update.by_layer and ranks.chief:
            self._fit_whole()
        if checkpoint is None and self._task.borrowed_weights:
            self._checkpoint()  # what they came from may change or vanish; the run needs it no more
        self._controls.take(loading.heard())

    def train(self) -> Outcome:
        """Trains until all steps are done, or a command or a guard ends it; leaves a checkpoint."""
        self._journal.enter(State.TRAINING)
        self._reporter.restart()
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
            try:
                if self._ranks.chief and not self._controls.ending:
                    self._keep_appointments()
                if self._ranks.any(self._controls.ending is not None):
                    outcome = self._controls.ending or Outcome(
                        State.STOPPED, "another rank was asked to stop", ExitCode.OK
                    )
                elif self.progress.step >= self._total_steps:
                    outcome = Outcome(State.FINISHED, f"all {self._total_steps} steps are done", ExitCode.OK)
                else:
                    outcome = self._take_step()
            except Exception as error:
                if not is_out_of_memory(error) or self._ranks.size > 1:  # the others would wait for ever
                    raise
                outcome = self._make_room(error)
        return outcome

    def _take_step(self) -> Outcome | None:
        step, started = self.progress.step + 1, time.monotonic()
        self._attendant.aside_seconds = 0.0
        if not self._accumulate(step):
            return None
        gradient = self._update.collect()
        judgement = self._judge(gradient)
        rate = self._ranks.decide_number(self._rate(step))
        if judgement.verdict is Verdict.APPLY:
            self._update.apply(gradient, rate)
        self.progress.step = step
        self.progress.trained_tokens += gradient.tokens
        self._report(gradient, rate, time.monotonic() - started)
        match judgement.verdict:
            case Verdict.SKIP:
                self._warn(f"step {step}: {judgement.reason}: the update was not applied", guard="divergence")
            case Verdict.GO_BACK:
                return self._go_back(step, judgement.reason)
            case Verdict.STOP:
                return self._diverged(step, judgement.reason)
        return None

    def _accumulate(self, step: int) -> bool:
        """Gathers the gradient of all of this rank's examples; false where the run is to end before that."""
        examples = self._task.examples(step, self._ranks.rank, self._ranks.size)
        done = 0
        while done < len(examples):
            self._attendant.begin()
            size, seed = self._micro_batch_size, _seed(self._profile.seed, step, done, self._ranks.rank)
            try:
                self._update.accumulate(self._task.batch(examples[done : done + size]), seed, self._between_layers)
                done += size
            except Abandoned:
                self._update.drop()
                done = 0
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                done = 0  # what was accumulated is dropped
                if outcome := self._make_room(error):
                    if self._ranks.size > 1:  # the others would wait for ever
                        raise
                    self._controls.end(outcome)
            self._attendant.serve()
            if self._controls.ending and self._ranks.size == 1:
                self._update.drop()  # done again, with the same numbers, when the run is resumed
                return False
        return True

    def _between_layers(self) -> None:
        if self._ranks.size > 1:  # the others wait for this micro-batch
            self._attendant.attend()
        else:
            self._attendant.between_layers()

    def _keep_appointments(self) -> None:
        """Validates and checkpoints the last completed step where it is time, and where that was cut short before."""
        step, settings = self.progress.step, self._settings
        if step >= self._total_steps or _is_due(step, settings.validation.every):
            self._validate(on_schedule=True)
        minutes = settings.checkpoint.every_minutes
        if _is_due(step, settings.checkpoint.every) or (minutes and self._saver.minutes >= minutes):
            self._checkpoint()

    # What is in force for the step under way

    @property
    def _settings(self) -> Profile:
        return self._amendments.at(self.progress.step + 1)

    @property
    def _micro_batch_size(self) -> int:
        share = self._profile.train.batch_size // self._ranks.size
        return min(self._settings.train.at_once or share, share)

    def _fit_whole(self) -> None:
        """The plan was one of layers; for the whole graph it may be that only smaller micro-batches fit."""
        train = self._profile.train.model_copy(update={"backward": "whole", "micro_batch_size": "auto"})
        size = settle(self._profile.model_copy(update={"train": train})).train.at_once or 1
        if size < self._micro_batch_size:
            now = self._micro_batch_size
            self._try_to_amend(lambda: self._amendments.set(self.progress.step, "train.micro_batch_size", str(size)))
            self._warn(f"micro-batch {now} → {size}: so the whole graph fits; still the same step", guard="plan")

    def _rate(self, step: int) -> float:
        rate = learning_rate(self._amendments.at(step).train, step, self._total_steps)
        return rate * self._amendments.learning_rate_scale(step)

    def _amend(self, setting: Set) -> None:
        """Changes a setting, as its owner asked; a mistake of theirs is no alarm of the run."""
        step = self.progress.step + 1
        try:
            self._amendments.set(self.progress.step, setting.key, setting.value)
        except NotStoredError as error:
            self._warn(str(error))
        except UserError as error:
            self._tell(f"not changed: {error}")
            return
        if setting.key in LIMITS:
            self._oversight.limit(self._amendments.guard())
        said = f"{setting.key} = {setting.value} from step {step:,} on"
        if setting.key.endswith("learning_rate"):
            schedule = self._settings.train.schedule
            said += f": its {schedule} schedule has the next step take {self._rate(step):.3e}"
        self._tell(said)

    def _try_to_amend(self, change: Callable[[], None]) -> None:
        try:
            change()
        except UserError as error:
            self._warn(str(error))

    # Between micro-batches: what was asked for, and what guards want

    def _do_errands(self) -> None:
        step = self.progress.step
        if self._controls.validation_asked() and not self._scorer.busy:
            if self._val_loss and self._val_loss[0] == step:
                self._tell(f"step {step} has been validated already")
            self._validate()
        if self._controls.checkpoint_asked():
            if self._saver.has(step):
                self._tell(f"step {step} has been saved already")
            self._checkpoint()
        for setting in self._controls.settings_asked():
            self._amend(setting)
        if self._ranks.chief:
            for action in self._oversight.actions(held=bool(self._controls.held)):
                self._carry_out(action)

    def _carry_out(self, action: Action) -> None:
        """Does what a guard asks for, and says so."""
        match action:
            case Warn():
                self._warn(action.text, "critical" if action.critical else "warning", action.guard)
            case Tell():
                self._tell(action.text)
            case ClearCache():
                self._warn(f"{action.reason}: cache cleared ({clear_cache() / 1e9:.2f} GB)", guard="memory")
            case Shrink():
                if not self._shrink(action.reason):
                    clear_cache()
            case Hold():
                self._warn(f"{action.reason}: pausing until it is green", "critical", "memory")
                self._controls.held = action.reason
                self._checkpoint()
                if self._profile.guard.memory.shrink:
                    self._shrink("so that it needs less when it goes on")
                clear_cache()
            case LetGo():
                self._tell(f"{action.reason}: going on")
                self._controls.held = ""
            case End():
                self._controls.end(action.outcome)

    def _shrink(self, reason: str) -> bool:
        """Halves the micro-batch from the next one on; the step stays the same. False where it cannot be halved."""
        size = self._micro_batch_size
        if size == 1:
            return False
        step = f"{self._profile.train.batch_size} sequences a step"
        self._try_to_amend(lambda: self._amendments.set(self.progress.step, "train.micro_batch_size", str(size // 2)))
        clear_cache()
        self._warn(f"{reason}: micro-batch {size} → {size // 2}, still {step}", guard="memory")
        return True

    # When a step is no good, or there is no room for it

    def _judge(self, gradient: Gradient) -> Judgement:
        judgement = self._divergence.judge(gradient.loss, gradient.norm, self._amendments.rollbacks)
        verdict = Verdict(self._ranks.decide(judgement.verdict))  # only rank 0 knows of the steps before a resume
        return Judgement(verdict, judgement.reason)

    def _go_back(self, step: int, reason: str) -> Outcome | None:
        """Goes on from a good checkpoint before the trouble, with a lower learning rate; if there is such a one."""
        last_good, checkpoint = self._ranks.decide(step - self._divergence.in_a_row), None
        if self._ranks.chief:
            checkpoint = find_good_checkpoint(self._run, last_good, self._warn)
        to_step = self._ranks.decide(checkpoint.step if checkpoint else 0)
        if to_step >= last_good:  # the same weights would meet the same trouble
            return self._diverged(step, reason)
        rate = f"{self._profile.guard.divergence.rollback_learning_rate:g} times the learning rate"
        text = f"step {step}: {reason}: going back to step {to_step}, with {rate}"
        self._warn(text, "critical", "divergence")
        self._go_on_from(checkpoint)  # first: a mark without its attempt would slow a run that never went back
        self._try_to_amend(partial(self._amendments.go_back, to_step, last_good + 1))
        self._journal.enter(State.TRAINING)
        return None

    def _diverged(self, step: int, reason: str) -> Outcome:
        count = self._amendments.rollbacks
        times = f" after going back {'once' if count == 1 else f'{count} times'}" if count else ""
        steps = f"{self._divergence.in_a_row} steps in a row were not applied"
        return Outcome(State.FAILED, f"training diverged: {steps}{times}; step {step}: {reason}", ExitCode.DIVERGED)

    def _make_room(self, error: Exception) -> Outcome | None:
        """After MLX ran out of memory: goes back to before the step and halves the micro-batch; or there is no way."""
        traceback.clear_frames(error.__traceback__)  # their arrays may be what fills the memory
        self._update.drop()
        self._answers.end_all("out of memory")
        clear_cache()
        words = " ".join(str(error).split())
        may_shrink = self._profile.guard.memory.shrink
        if may_shrink and self._shrink(f"out of memory ({words})"):
            if not self._update.intact:
                self._restore_last()
            return None
        why = "with the smallest micro-batch" if may_shrink else "and guard.memory.shrink is false"
        reason = f"out of memory {why} ({words}); {_less_memory(self._settings)}"
        return Outcome(State.STOPPED, reason, ExitCode.MEMORY)

    def _restore_last(self) -> None:
        """The weights were spoiled half-way through an update: back to the last checkpoint."""
        checkpoint = find_last_checkpoint(self._run, self._warn)
        self._warn(f"the update failed half-way: going back to step {checkpoint.step if checkpoint else 0}")
        self._go_on_from(checkpoint)
        self._journal.enter(State.TRAINING)

    # What a step leaves behind

    def _report(self, gradient: Gradient, rate: float, step_seconds: float) -> None:
        progress = self.progress
        seconds = max(step_seconds - self._attendant.aside_seconds, 1e-9)
        self._vigil.hang.beat(seconds)
        progress.elapsed_seconds += seconds
        if math.isfinite(gradient.loss):
            progress.loss_sum, progress.loss_steps = progress.loss_sum + gradient.loss, progress.loss_steps + 1
        self._reporter.tell(
            progress.step,
            gradient,
            rate,
            self._micro_batch_size,
            progress.trained_tokens,
            seconds,
            progress.elapsed_seconds,
            self._attendant.paused_seconds(),
        )
        self._reporter.tell_memory(progress.step, self._task.model, self._update, gradient)

    def _validate(self, on_schedule: bool = False) -> None:
        """Measures the held-out loss of the last completed step, once; a stop cuts it short."""
        step, progress = self.progress.step, self.progress
        if self._val_loss and self._val_loss[0] == step:
            return
        with self._attendant.aside():
            metrics = self._scorer.measure(self._micro_batch_size, self._heldout_examples)
            if metrics is None:
                return
            loss = metrics["val_loss"]
            best = math.isfinite(loss) and (progress.best_val_loss is None or loss < progress.best_val_loss)
            self._val_loss = (step, loss)
            self._journal.record(step, metrics)
            self._journal.say(Validated(step=step, metrics=metrics, best=best))
            actions: list[Action] = []
            if on_schedule:  # whoever only looks does not hasten the end
                train_loss = progress.loss_sum / progress.loss_steps if progress.loss_steps else math.nan
                progress.loss_sum, progress.loss_steps = 0.0, 0
                actions = self._early_stopping.judge(step, loss, train_loss)
            if best:
                progress.best_val_loss = loss
            if best or self._saver.has(step):
                self._checkpoint()  # the best is always kept
            for action in actions if step < self._total_steps else ():
                self._carry_out(action)

    @property
    def _heldout_examples(self) -> int | None:
        """So many whatever the micro-batch has shrunk to, as otherwise scores could not be compared."""
        train = self._profile.train
        return self._settings.validation.batches * (train.at_once or train.batch_size) or None

    def _checkpoint(self) -> bool:
        if not self._ranks.chief:
            return True
        step = self.progress.step
        val_loss = self._val_loss[1] if self._val_loss and self._val_loss[0] == step else None
        state = {
            "progress": asdict(self.progress),
            "guard": {"divergence": self._divergence.state(), "early_stopping": self._early_stopping.state()},
            "micro_batch_size": self._micro_batch_size,
            "val_loss": val_loss if val_loss is None or math.isfinite(val_loss) else None,
        }
        with self._attendant.aside():
            self._vigil.hang.beat()
            done = self._saver.save(step, self._settings.checkpoint.keep, state)
            self._vigil.hang.beat()
            return done

    # Opening and closing

    def _go_on_from(self, checkpoint: Checkpoint | None) -> None:
        """Takes weights, optimizer and all that a checkpoint remembers, or begins at step 0; opens an attempt."""
        parameters = self._task.load(checkpoint.path) if checkpoint else self._task.initial_parameters()
        self._update.restore(parameters, checkpoint.optimizer_state() if checkpoint else None)
        state = checkpoint.state() if checkpoint else {}
        self.progress, guard = Progress(**state.get("progress", {})), state.get("guard", {})
        self._divergence.restore(guard.get("divergence", {}))
        self._early_stopping.restore(guard.get("early_stopping", {}))
        self._saver.adopt(checkpoint)
        val_loss = state.get("val_loss")
        self._val_loss = None if val_loss is None else (self.progress.step, val_loss)
        self.progress.step = self._ranks.decide(self.progress.step)
        self._reporter.restart()
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
                parameters=self._task.size,
                trained_parameters=sum(array.size for _, array in tree_flatten(self._update.parameters)),
                step=self.progress.step,
                total_steps=self._total_steps,
                attempt=attempt,
            )
        )

    def _close(self, outcome: Outcome) -> Outcome:
        self._answers.end_all("run ended")
        if outcome.state is not State.FINISHED:
            self._journal.enter(State.STOPPING, outcome.reason)
        begun = self.progress.step > 0  # before the first step there is nothing that the seed does not give again
        if not outcome.checkpoint or not begun or (self._update.intact and self._checkpoint()):
            return outcome
        reason = f"{outcome.reason}, but its last checkpoint could not be written: resume goes on from the one before"
        return Outcome(State.FAILED, reason, outcome.exit_code or ExitCode.BAD_INPUT)

    def _rescue(self, error: Exception) -> None:
        """Saves the last completed step before a failure ends the run; only one inside the update spoils weights."""
        self._update.drop()
        traceback.clear_frames(error.__traceback__)  # their arrays may be what fills the memory
        with contextlib.suppress(Exception):  # the failure itself is what the user has to hear of
            self._answers.end_all("run ended")
            if self._update.intact and self.progress.step:
                self._checkpoint()

    def _warn(self, text: str, level: str = "warning", guard: str = "") -> None:
        self._journal.say(Alarm(level=level, text=text, guard=guard))

    def _tell(self, text: str) -> None:
        self._journal.say(Notice(text=text))


def _less_memory(profile: Profile) -> str:
    """What would take a tenth less of MLX's memory at least, as the plan says; in words."""
    now = plan(profile)
    nearest = suggest(profile, limit_bytes=now.need_bytes - now.predicted_peak_bytes // 10)
    if not nearest:
        return "it needs a smaller model, or a larger machine"
    return " or ".join(f"{', '.join(it.settings)} would need {gigabytes(it.saving_bytes)} less" for it in nearest)


def _is_due(step: int, every: int) -> bool:
    return step > 0 and every > 0 and step % every == 0


def _seed(*parts: int) -> int:
    """One seed from several numbers, so that nothing that happened before can change it."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)
