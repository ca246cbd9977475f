"""Measures a model on the held-out data, as training is measured: interruptible between micro-batches."""

from __future__ import annotations

from collections.abc import Mapping

from engine.attending import Abandoned, Attendant
from engine.controls import Controls
from engine.events import State
from engine.journal import Journal
from engine.tasks import Task
from engine.update import Update


class Scorer:
    """Chats are served and pauses kept meanwhile; a run that shall end cuts it short."""

    def __init__(self, task: Task, update: Update, journal: Journal, controls: Controls, attendant: Attendant) -> None:
        self._task, self._update, self._journal = task, update, journal
        self._controls, self._attendant = controls, attendant
        self.busy = False

    def measure(self, size: int, most: int | None) -> Mapping[str, float] | None:
        """Metrics of `most` held-out examples (all if None), `size` at a time; None where it was cut short."""
        state, loss_sum, tokens = self._journal.state, 0.0, 0
        self._journal.enter(State.VALIDATING)
        self.busy = True
        try:
            for batch in self._task.heldout(size, most):
                self._attendant.begin()
                loss_sum += self._update.loss(batch, self._between_layers)
                tokens += batch.tokens
                self._attendant.attend()
                if state is not State.PAUSED:  # what was asked for in a pause is done in it
                    self._attendant.hold()
                if self._controls.ending:
                    return None
        except Abandoned:
            return None
        except Exception:
            self._journal.enter(state)
            raise
        finally:
            self.busy = False
        self._journal.enter(state)
        return self._task.heldout_metrics(loss_sum, tokens)

    def _between_layers(self) -> None:
        self._attendant.attend()
        if self._controls.ending:
            raise Abandoned
