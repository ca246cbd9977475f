"""The checkpoints of a run as it goes: written, noted, pruned. A failure is an alarm, never an end."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from engine.checkpoint import Checkpoint, CheckpointError, prune_checkpoints, save_checkpoint
from engine.errors import UserError
from engine.events import Alarm, CheckpointSaved
from engine.journal import Journal
from engine.store import RunDirectory
from engine.tasks import Task
from engine.update import Update


class Saver:
    """Saves the state of a run's last completed step."""

    def __init__(self, run: RunDirectory, journal: Journal, task: Task, update: Update) -> None:
        self._run, self._journal, self._task, self._update = run, journal, task, update
        self._last: Checkpoint | None = None
        self._failed_at_step: int | None = None
        self._tried_at = time.monotonic()

    @property
    def minutes(self) -> float:
        """Since the last try to save."""
        return (time.monotonic() - self._tried_at) / 60

    def has(self, step: int) -> bool:
        """Whether the newest checkpoint is that of this step."""
        return self._last is not None and self._last.step == step

    def adopt(self, checkpoint: Checkpoint | None) -> None:
        """The run goes on from this one."""
        self._last = checkpoint

    def save(self, step: int, keep: int, state: Mapping[str, Any]) -> bool:
        """Writes a checkpoint of `step`, or notes in the one that there is what has changed; false if it failed."""
        self._journal.settle()
        try:
            if self._last is not None and self._last.step == step:
                self._last.note(**state)  # it may have been validated since
            else:
                self._write(step, state)
                self._prune(keep)
            self._failed_at_step = None
        except CheckpointError as error:
            if self._failed_at_step != step:  # said once; it is tried again whenever there is an occasion
                self._warn(f"{error}; training goes on, the checkpoints before it are kept", "critical")
            self._failed_at_step = step
            return False
        finally:
            self._tried_at = time.monotonic()
        return True

    def _write(self, step: int, state: Mapping[str, Any]) -> None:
        started = time.monotonic()
        self._last = save_checkpoint(
            self._run,
            step,
            self._journal.attempt,
            lambda folder: self._task.save(self._update.parameters, folder),
            self._update.optimizer_state(),
            state,
        )
        seconds, size = time.monotonic() - started, self._last.size_bytes()
        self._journal.say(CheckpointSaved(step=step, path=str(self._last.path), size_bytes=size, seconds=seconds))

    def _prune(self, keep: int) -> None:
        if not self._journal.stored:
            return  # what belongs to this attempt is known from the store
        try:
            prune_checkpoints(self._run, keep)
        except UserError as error:
            self._warn(f"{error}; old checkpoints are kept meanwhile")

    def _warn(self, text: str, level: str = "warning") -> None:
        self._journal.say(Alarm(level=level, text=text))
