"""How long a run will take: from this machine's earlier runs, or from steps that were measured for it."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

from engine.cores import ranks_launched
from engine.data.text_dataset import cache_folder
from engine.durable import write_json
from engine.environment import environment
from engine.errors import UserError
from engine.guards.limits import TimeLimits
from engine.planning import demand_of, micro_batch
from engine.profile import Profile, RetentionProfile
from engine.profile_files import validate_profile, with_override
from engine.runs import list_runs
from engine.store import RunDirectory

_RUNS_READ = 30
_STEPS_READ = 200
_ENOUGH_STEPS = 5
"""A run of fewer tells little: the first step also compiles, or waits for a disk."""
_MEASUREMENTS_KEPT = 200
_FARTHEST = 30.0
"""A step of so many times the operations of another, or of so many times fewer, is not judged by that one."""


@dataclass(frozen=True)
class Timing:
    """`seconds` are of the training steps alone, without validations and checkpoints; None is unknown.

    `source` says what they are known from; an `estimate` is another shape's time, scaled by the operations of a step.
    `limit_at` is when guard.stop_at or guard.max_hours ends a run that starts now, in seconds since the epoch.
    """

    steps: int | None = None
    seconds_a_step: float | None = None
    source: Literal["measured", "earlier runs", "estimate", "unknown"] = "unknown"
    samples: int = 0
    """Steps that it is known from."""
    limit_at: float | None = None
    limit: str = ""

    @property
    def seconds(self) -> float | None:
        if self.steps is None or self.seconds_a_step is None:
            return None
        return self.steps * self.seconds_a_step

    def steps_within(self, now: float) -> int | None:
        """Steps that are done when the time is up; None where there is no limit, or too little is known."""
        if self.limit_at is None or not math.isfinite(self.limit_at) or not self.seconds_a_step:
            return None
        done = max(0.0, self.limit_at - now) / self.seconds_a_step
        return int(done) if self.steps is None else int(min(done, self.steps))


@dataclass(frozen=True)
class _Sample:
    """What steps of some profile took on this machine."""

    profile: Profile
    seconds_a_step: float
    steps: int
    time: float
    """When, in seconds since the epoch."""
    measured: bool
    """By `plan --measure`, not in a run."""


def foresee(profile: Profile, runs_folder: Path | None, except_run: str | None = None) -> Timing:
    """When a run that starts now would end. Reads the newest runs of `runs_folder`."""
    now, guard = time.time(), profile.guard
    limits = TimeLimits(guard.stop_at, guard.max_hours, now, now)
    words = f"by {guard.stop_at}" if guard.stop_at else f"in {guard.max_hours:g} h" if guard.max_hours else ""
    if guard.stop_at and guard.max_hours and limits.moment == now + 3600 * guard.max_hours:
        words = f"in {guard.max_hours:g} h"
    head: dict[str, Any] = {"steps": _total_steps(profile), "limit_at": limits.moment, "limit": words}
    samples = [*_measured(), *_from_runs(runs_folder, except_run)]
    if not samples:
        return Timing(**head)
    own = _shape(profile)
    alike = [sample for sample in samples if _shape(sample.profile) == own]
    if alike:
        chosen = max(alike, key=lambda sample: (sample.measured or sample.steps >= _ENOUGH_STEPS, sample.time))
        source: Literal["measured", "earlier runs"] = "measured" if chosen.measured else "earlier runs"
        return Timing(**head, seconds_a_step=chosen.seconds_a_step, source=source, samples=chosen.steps)
    operations = _operations(profile)
    # One kind's operations take another time than another's.
    known = [(sample, _operations(sample.profile)) for sample in samples if sample.profile.kind == profile.kind]
    factors = [(operations / theirs, sample) for sample, theirs in known if operations and theirs]
    if not factors:
        return Timing(**head)
    factor, nearest = min(factors, key=lambda found: abs(math.log(found[0])))
    if not 1 / _FARTHEST <= factor <= _FARTHEST:
        return Timing(**head)
    return Timing(**head, seconds_a_step=nearest.seconds_a_step * factor, source="estimate", samples=nearest.steps)


def remember(profile: Profile, seconds_a_step: float, steps: int) -> None:
    """Keeps what steps took here for later plans; where that cannot be written, they do without."""
    entry = {
        "machine": _machine(environment()),
        "profile": profile.model_dump(mode="json", by_alias=True),
        "seconds_a_step": seconds_a_step,
        "steps": steps,
        "time": time.time(),
    }
    with contextlib.suppress(OSError):
        path = _file()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, [entry, *_entries()][:_MEASUREMENTS_KEPT])


def _measured() -> Iterator[_Sample]:
    """What was measured on this machine, the newest first."""
    here = _machine(environment())
    for entry in _entries():
        with contextlib.suppress(KeyError, TypeError, ValueError, UserError):
            if entry["machine"] == here:
                profile = validate_profile(entry["profile"], where="a measurement")
                seconds, steps, then = float(entry["seconds_a_step"]), int(entry["steps"]), float(entry.get("time", 0))
                if seconds > 0:
                    yield _Sample(profile, seconds, steps, then, measured=True)


def _from_runs(folder: Path | None, except_run: str | None) -> Iterator[_Sample]:
    """What steps of earlier runs took on this machine, the newest run first."""
    if folder is None:
        return
    here = _machine(environment())
    earlier = [summary for summary in list_runs(folder) if summary.name != except_run]
    for summary in earlier[:_RUNS_READ]:
        run = RunDirectory(summary.path)
        with contextlib.suppress(UserError, KeyError, TypeError, ValueError):
            identity = run.identity()
            if _machine(identity["environment"]) != here:
                continue
            profile = validate_profile(identity["profile"], where=run.name)
            rates, sizes = (run.tail(metric, _STEPS_READ) for metric in ("steps_per_second", "micro_batch_size"))
            size = next(iter(sizes.values()), None)  # a guard may have made it smaller on the way
            known = [rate for step, rate in rates.items() if 0 < rate < math.inf and sizes.get(step) == size]
            if size is not None:
                profile = with_override(profile, f"train.micro_batch_size={size:.0f}")
            if known:
                yield _Sample(profile, 1 / median(known), len(known), summary.updated, measured=False)


def _machine(environment: Mapping[str, Any]) -> list[Any]:
    """What the speed of a step depends on beside its profile."""
    machine = environment.get("machine", {})
    parts = [machine.get(name) for name in ("processor", "cores", "memory_bytes")]
    return [*parts, *(environment.get(name) for name in ("device", "blas", "blas_threads", "ranks"))]


def _shape(profile: Profile) -> tuple[Any, ...]:
    """What the time of a step depends on, on this number of ranks."""
    train = profile.train
    size = (
        train.batch_size,
        micro_batch(profile, ranks_launched()),
        train.sequence_length,
        train.gradient_checkpointing,
        train.backward,
        train.dtype,
    )
    return (profile.kind, *demand_of(profile).shape(profile), *size)


def _operations(profile: Profile) -> float | None:
    """None where the shape of what is trained is not known, or it is wrong."""
    try:
        return demand_of(profile).operations(profile)
    except UserError:
        return None


def _total_steps(profile: Profile) -> int | None:
    """None where it depends on the data."""
    train = profile.train
    if train.steps is not None:
        return train.steps
    if train.tokens is not None and isinstance(profile, RetentionProfile):  # whose sequences are all of one length
        return -(-train.tokens // (train.batch_size * train.sequence_length))
    return None


def _entries() -> list[Any]:
    try:
        entries = json.loads(_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return entries if isinstance(entries, list) else []


def _file() -> Path:
    return cache_folder().parent / "measured-steps.json"
