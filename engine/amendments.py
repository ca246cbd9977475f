"""Settings that change while a run trains, each from a step on: a resumed run changes them at the same steps."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from engine.errors import UserError
from engine.profile import Guard, Profile
from engine.profile_files import with_override
from engine.store import RunDirectory

LIMITS = ("guard.stop_at", "guard.max_hours")
"""These are of the clock, not of a step: the newest word counts, and `none` lifts one."""

AMENDABLE = (
    "train.learning_rate",
    "train.final_learning_rate",
    "train.micro_batch_size",
    "validate.every",
    "validate.batches",
    "checkpoint.every",
    "checkpoint.every_minutes",
    "checkpoint.keep",
    *LIMITS,
)
"""What may change without making it another run."""

ROLLBACK = "rollback"
"""The key of a mark that the run has gone back; no setting."""


@dataclass(frozen=True, slots=True)
class Amendment:
    """In force for the steps after `from_step`: a key of the profile with its value.

    Or the mark of a rollback, whose value is the step that the run has gone back for.
    """

    from_step: int
    key: str
    value: str


class NotStoredError(UserError):
    """It is in force, but a resumed run would not know of it."""


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
        """The profile as it is for `step`, but for the limits."""
        settings = tuple(entry for entry in self._settings() if entry.from_step < step)
        if settings not in self._known:
            self._known[settings] = _amended(self._profile, settings)
        return self._known[settings]

    def guard(self) -> Guard:
        """`[guard]` with the limits that are in force."""
        guard = self._profile.guard
        for entry in self._list:
            if entry.key in LIMITS:
                guard = _limited(guard, entry)
        return guard

    @property
    def rollbacks(self) -> int:
        """How often the run has gone back because it diverged."""
        return len(self._marks())

    def learning_rate_scale(self, step: int) -> float:
        """What the learning rate of `step` is multiplied with, for having gone back."""
        times = sum(entry.from_step < step for entry in self._marks())
        return self._profile.guard.divergence.rollback_learning_rate**times

    def set(self, from_step: int, key: str, value: str) -> None:
        """Changes a setting for the steps after `from_step`, also where it was to change again at a later one.

        Raises `UserError` where the key cannot be changed or the value is wrong, `NotStoredError` where it could not be
        stored.
        """
        amendment = Amendment(from_step, key, value)
        if key not in AMENDABLE:
            raise UserError(f"{key} cannot be changed while a run trains; {', '.join(AMENDABLE)} can")
        if key == "train.micro_batch_size" and value.strip(" \"'") == "auto":
            raise UserError(f"{key}: auto is chosen before a run begins; give a number")
        if key in LIMITS:
            _limited(self._profile.guard, amendment, self._profile)
            kept = [entry for entry in self._list if entry.key != key]
        else:
            kept = [entry for entry in self._list if entry.key != key or entry.from_step < from_step]
            later = {entry.from_step for entry in kept if entry.from_step > from_step}
            for step in sorted({from_step, *later}):  # whatever is in force then must go together
                profile = self._profile
                for entry in self._settings([*kept, amendment]):
                    if entry.from_step <= step:
                        profile = with_override(profile, f"{entry.key}={entry.value}")
        self._list = [*kept, amendment]
        self._store()

    def go_back(self, to_step: int, because_of: int) -> None:
        """Marks a rollback for the sake of a step: the learning rate is lower after `to_step`."""
        self._list.append(Amendment(to_step, ROLLBACK, str(because_of)))
        self._store()

    def forget_after(self, step: int) -> None:
        """Drops what was changed beyond `step`, but for limits: the owner goes back there to take another course."""
        kept = [entry for entry in self._list if entry.from_step <= step or entry.key in LIMITS]
        if len(kept) < len(self._list):
            self._list = kept
            self._store()

    def _settings(self, entries: Iterable[Amendment] | None = None) -> list[Amendment]:
        """In the order of their steps."""
        chosen = self._list if entries is None else entries
        return sorted((e for e in chosen if e.key not in (*LIMITS, ROLLBACK)), key=lambda entry: entry.from_step)

    def _marks(self) -> list[Amendment]:
        return [entry for entry in self._list if entry.key == ROLLBACK]

    def _store(self) -> None:
        try:
            self._write([asdict(entry) for entry in self._list])
        except UserError as error:
            raise NotStoredError(
                f"{error}; what was changed is in force, but a resumed run would not know of it"
            ) from None


def _amended(profile: Profile, entries: Iterable[Amendment]) -> Profile:
    for entry in entries:
        with contextlib.suppress(UserError):  # looked at when it was set; a night must not end with it
            profile = with_override(profile, f"{entry.key}={entry.value}")
    return profile


def _limited(guard: Guard, entry: Amendment, profile: Profile | None = None) -> Guard:
    """`[guard]` with a limit set or lifted; with `profile`, raises `UserError` for a wrong value."""
    name = entry.key.removeprefix("guard.")
    if entry.value.strip().lower() == "none":
        return guard.model_copy(update={name: None})
    if profile is not None:
        return with_override(profile, f"{entry.key}={entry.value}").guard
    with contextlib.suppress(UserError, ValueError):
        value = float(entry.value) if name == "max_hours" else entry.value.strip("\"'")
        return guard.model_copy(update={name: value})
    return guard
