"""Settings that change while a run trains, each from a step on: a resumed run changes them at the same steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from engine.errors import UserError
from engine.profile import Profile
from engine.profile_files import with_override
from engine.store import RunDirectory

AMENDABLE = (
    "train.learning_rate",
    "train.final_learning_rate",
    "train.micro_batch_size",
    "validate.every",
    "validate.batches",
    "checkpoint.every",
    "checkpoint.every_minutes",
    "checkpoint.keep",
    "guard.stop_at",
    "guard.max_hours",
)
"""What may change without making it another run."""

_ROLLBACK = "rollback"


@dataclass(frozen=True, slots=True)
class Amendment:
    """In force for the steps after `from_step`: a key of the profile with its value, or the mark of a rollback."""

    from_step: int
    key: str
    value: str


class Amendments:
    """What has been changed in a run. `write` stores the list (run.json), and may fail with `UserError`."""

    def __init__(self, profile: Profile, stored: Sequence[dict[str, Any]], write: Callable[[list[Any]], None]) -> None:
        self._profile, self._write = profile, write
        self._list = [Amendment(int(entry["from_step"]), entry["key"], entry["value"]) for entry in stored]
        self._known: dict[tuple[Amendment, ...], Profile] = {}

    @classmethod
    def of(cls, profile: Profile, run: RunDirectory | None) -> Self:
        """Those in run.json, where new ones go too; without a run (a rank that only computes) in memory alone."""
        if run is None:
            return cls(profile, (), lambda entries: None)
        stored = run.identity().get("amendments", ())
        return cls(profile, stored, lambda entries: run.update_identity(amendments=entries))

    def at(self, step: int) -> Profile:
        """The profile as it is for `step`."""
        settings = tuple(entry for entry in self._list if entry.from_step < step and entry.key != _ROLLBACK)
        if settings not in self._known:
            profile = self._profile
            for entry in settings:
                profile = with_override(profile, f"{entry.key}={entry.value}")
            self._known[settings] = profile
        return self._known[settings]

    @property
    def rollbacks(self) -> int:
        """How often the run has gone back because it diverged."""
        return sum(entry.key == _ROLLBACK for entry in self._list)

    def learning_rate_scale(self, step: int) -> float:
        """What the learning rate of `step` is multiplied with, for having gone back."""
        times = sum(entry.key == _ROLLBACK and entry.from_step < step for entry in self._list)
        return self._profile.guard.divergence.rollback_learning_rate**times

    def set(self, from_step: int, key: str, value: str) -> None:
        """Changes a setting for the steps after `from_step`.

        Raises `UserError` where the key cannot be changed, the value is wrong, or it could not be stored; in the last
        case it is in force all the same.
        """
        if key not in AMENDABLE:
            raise UserError(f"{key} cannot be changed while a run trains; {', '.join(AMENDABLE)} can")
        with_override(self.at(from_step + 1), f"{key}={value}")
        self._add(Amendment(from_step, key, value))

    def go_back(self, to_step: int, reason: str) -> None:
        """Marks a rollback: the learning rate is lower after `to_step`."""
        self._add(Amendment(to_step, _ROLLBACK, reason))

    def forget_after(self, step: int) -> None:
        """Drops what was changed beyond `step`: the owner goes back there to take another course."""
        kept = [entry for entry in self._list if entry.from_step < step]
        if len(kept) < len(self._list):
            self._list = kept
            self._store()

    def _add(self, amendment: Amendment) -> None:
        self._list.append(amendment)
        self._store()

    def _store(self) -> None:
        self._write([asdict(entry) for entry in self._list])
