"""What is looked at before a run trains: is it the same run, where does it go on, do all ranks agree."""

from __future__ import annotations

from collections.abc import Callable

from engine.checkpoint import Checkpoint, choose_checkpoint, latest_intact, list_checkpoints
from engine.environment import differences, environment
from engine.errors import UserError
from engine.events import State
from engine.ranks import Ranks
from engine.store import RunDirectory

Say = Callable[[str], None]

_LOOK_BACK_STEPS = 10
"""A checkpoint this close before the trouble would walk into it again with the same weights."""


def find_checkpoint(run: RunDirectory, which: str, tell: Say, warn: Say) -> Checkpoint | None:
    """What to resume from: `latest`, `best` or a step; None where there is no checkpoint and the run begins again.

    Raises `UserError` where none is intact, or the one asked for does not exist.
    """
    attempts, ends = run.attempts(), [state for state in State if state.final]
    if attempts and attempts[-1].state not in ends:
        tell("the attempt before was cut off without a word: it was killed, or power was lost")
    if which != "latest":
        return choose_checkpoint(run, which)
    checkpoints = list_checkpoints(run)
    if not checkpoints:
        tell("there is no checkpoint to resume from: starting again at step 0")
        return None
    return latest_intact(run, checkpoints, warn)


def find_good_checkpoint(run: RunDirectory, before_step: int, warn: Say) -> Checkpoint | None:
    """The newest intact checkpoint well before `before_step`, else the oldest; None where there is none at all.

    Raises `UserError` where none is intact.
    """
    checkpoints = list_checkpoints(run)
    if not checkpoints:
        return None
    good = [checkpoint for checkpoint in checkpoints if checkpoint.step <= before_step - _LOOK_BACK_STEPS]
    try:
        return latest_intact(run, good or checkpoints[:1], warn)
    except UserError:
        return latest_intact(run, checkpoints, warn)


def find_last_checkpoint(run: RunDirectory, warn: Say) -> Checkpoint | None:
    """The newest intact checkpoint; None where there is none at all. Raises `UserError` where none is intact."""
    checkpoints = list_checkpoints(run)
    return latest_intact(run, checkpoints, warn) if checkpoints else None


def check_identity(run: RunDirectory, data_digest: str, warn: Say) -> None:
    """Records what data a run has, or raises `UserError` where they are not those that it began with.

    Warns of what else has changed on this machine since.
    """
    identity = run.identity()
    recorded = identity.get("data_digest")
    if recorded is None:
        run.update_identity(data_digest=data_digest)
        return
    for difference in differences(identity.get("environment", {}), environment()):
        warn(f"{difference}: the losses may differ in their last digits from a run never interrupted")
    if recorded != data_digest:
        raise UserError(
            f"run {run.name}: its data or base are not those that it began with; bring them back, or start a new run"
        )


def compare_ranks(ranks: Ranks, data_digest: str, total_steps: int) -> None:
    """Raises `UserError` where the ranks, each of which takes its share of the same batches, are not alike."""
    if not ranks.same(data_digest):
        raise UserError("the ranks do not have the same data; copy one machine's data to the others")
    if not ranks.same(str(total_steps)):
        raise UserError("the ranks do not train for the same number of steps; give all of them the same profile")
