"""How much memory a profile will need, whether this machine has it, what would fit, and how long it will take.

No weight is loaded for it and nothing allocated: it is arithmetic on the profile (engine/planning/), in milliseconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from engine.amendments import Amendments
from engine.errors import UserError
from engine.events import Level
from engine.planning import (
    ACTIVATIONS,
    FROZEN,
    IN_MLX,
    OPTIMIZER,
    STATES,
    TRAINED,
    Moment,
    Saving,
    Setting,
    UnknownShapeError,
    demand_of,
    micro_batch,
    micro_batches,
)
from engine.planning.capacity import Bound, Capacity, gigabytes, this_capacity, this_setting
from engine.planning.pace import Timing, foresee
from engine.profile import Profile
from engine.profile_files import validate_profile, with_override
from engine.store import RunDirectory

CACHE = "allocator_cache"
PROCESS = "rest_of_process"

_PROCESS_BYTES = 200_000_000
"""Python, MLX, the tokenizer and the app: 160 MB without the screen, some 40 MB more with it."""

_CPU_CACHE_BYTES = 1 << 25
"""What MLX's CPU allocator keeps at most; measured, MLX 0.32."""

_GPU_CACHE_SHARE = 0.1
"""Of what comes and goes in a step; more is kept where there is room, and given back where there is none."""

_SHORTEST = 128
"""Sequences shorter than this are not suggested."""

_LARGEST_CHOSEN = 16
"""Larger micro-batches make no step faster that is worth one: what `auto` chooses."""


@dataclass(frozen=True)
class Suggestion:
    """Settings to add, each as `--set` takes it, and what a run with them would need."""

    settings: tuple[str, ...]
    need_bytes: int
    saving_bytes: int
    words: str

    @property
    def options(self) -> str:
        """As the command line takes them."""
        return " ".join(f"--set {setting}" for setting in self.settings)


@dataclass(frozen=True)
class Plan:
    """What a run of a profile will need at its peak.

    `components` are bytes by name; those of `engine.planning.IN_MLX` add up to `predicted_peak_bytes`, MLX's own peak,
    and all of them to `need_bytes`. `activation_bytes` are a micro-batch's, with gradient checkpointing off and on.
    Where the shape of what is trained is not known yet, there are none of them, and `level` is None.
    """

    profile: Profile
    """Settled: nothing in it is `auto` that the planner decides."""
    components: Mapping[str, int]
    moment: str
    activation_bytes: Mapping[bool, int]
    parameters: int
    micro_batch_size: int
    accumulation: int
    capacity: Capacity
    level: Level | None
    """None where nothing is known of what this machine has."""
    verdict: str
    """A sentence."""
    reason: str
    """The part of it that says why all is not well; empty where it is."""
    suggestions: tuple[Suggestion, ...]
    savings: tuple[Saving, ...]
    download_bytes: int
    timing: Timing

    @property
    def predicted_peak_bytes(self) -> int:
        """Of MLX, as `mx.get_peak_memory` counts."""
        return sum(self.components[name] for name in IN_MLX if name in self.components)

    @property
    def need_bytes(self) -> int:
        """Of the whole process."""
        return sum(self.components.values())

    @property
    def tightest(self) -> Bound | None:
        """The limit that is met first."""
        bounds = self.capacity.bounds(self.predicted_peak_bytes, self.need_bytes)
        return bounds[0] if bounds else None

    @property
    def warning(self) -> str:
        """One line for somebody who starts it all the same; empty where all is well, or this machine is unknown."""
        if not self.components:
            return self.verdict
        if self.level in (Level.GREEN, None):
            return ""
        nearest = f"; less is needed with {self.suggestions[0].options}" if self.suggestions else ""
        return f"{self.verdict}{nearest}"


def plan(
    profile: Profile,
    *,
    runs_folder: Path | None = None,
    except_run: str | None = None,
    limit_bytes: int | None = None,
    capacity: Capacity | None = None,
    setting: Setting | None = None,
) -> Plan:
    """The plan of a profile on this machine, or on one that is given.

    `runs_folder` is where earlier runs are looked for, to say how long it will take; `except_run` is the one that the
    plan is for. `limit_bytes` stands for what the process may use, instead of this machine's memory.
    """
    setting = setting or this_setting(profile)
    capacity = _capacity(profile, limit_bytes, capacity)
    asked, profile = profile, settle(profile, capacity=capacity, setting=setting)
    demand, timing = demand_of(profile), foresee(profile, runs_folder, except_run)
    size, parts = micro_batch(profile, setting.ranks), micro_batches(profile, setting.ranks)
    try:
        components, moment = _components(profile, setting)
    except UnknownShapeError as error:
        least = "" if profile == asked else f"; until then it is to take least: {size} at once, layer by layer"
        verdict, none = f"unknown: {error}{least}", {False: 0, True: 0}
        return Plan(profile, {}, "", none, 0, size, parts, capacity, None, verdict, "", (), (), 0, timing)
    need = sum(components.values())
    level, why = capacity.judge(_in_mlx(components), need)
    suggestions = suggest(profile, capacity=capacity, setting=setting) if level not in (Level.GREEN, None) else ()
    reason = _reason(components, level, why, fits=bool(suggestions))
    return Plan(
        profile=profile,
        components=components,
        moment=moment.name,
        activation_bytes={on: _activations(_checkpointed(profile, on), setting) for on in (False, True)},
        parameters=demand.parameters(profile),
        micro_batch_size=size,
        accumulation=parts,
        capacity=capacity,
        level=level,
        verdict=_verdict(need, capacity, level, reason or why, fits=bool(suggestions))
        + _on_a_gpu(profile, setting, level),
        reason=reason,
        suggestions=suggestions,
        savings=tuple(demand.savings(profile, setting)),
        download_bytes=demand.download_bytes(profile),
        timing=timing,
    )


def settle(
    profile: Profile,
    limit_bytes: int | None = None,
    *,
    capacity: Capacity | None = None,
    setting: Setting | None = None,
) -> Profile:
    """The profile with a number and a way in the place of `auto`, so that a run keeps them when it is resumed.

    train.backward: whole where that fits with room to spare, else layerwise. train.micro_batch_size: the largest power
    of two that does, up to 16; at least 1. Where too little is known, what takes least. `limit_bytes` is as for `plan`.
    """
    train = profile.train
    if train.backward != "auto" and train.micro_batch_size != "auto":
        return profile
    setting = setting or this_setting(profile)
    capacity = _capacity(profile, limit_bytes, capacity)

    def fits(candidate: Profile) -> bool:
        try:
            components, _ = _components(candidate, setting)
        except UnknownShapeError:
            return False
        return capacity.judge(_in_mlx(components), sum(components.values()))[0] is Level.GREEN

    def settled(backward: str, size: int) -> Profile:
        chosen = {"backward": backward, "micro_batch_size": size if train.micro_batch_size == "auto" else train.at_once}
        return profile.model_copy(update={"train": train.model_copy(update=chosen)})

    backward: str = train.backward
    if backward == "auto":
        backward = "whole" if fits(settled("whole", 1)) else "layerwise"
    share, size = max(1, train.batch_size // setting.ranks), 1
    if train.micro_batch_size == "auto":
        while 2 * size <= min(share, _LARGEST_CHOSEN) and fits(settled(backward, 2 * size)):
            size *= 2
    return settled(backward, size)


def suggest(
    profile: Profile,
    limit_bytes: int | None = None,
    *,
    capacity: Capacity | None = None,
    setting: Setting | None = None,
) -> tuple[Suggestion, ...]:
    """The nearest settings with which a profile fits, those that change least first.

    Smaller micro-batches (of the same effective batch), then what else leaves the training as it is (the kind's
    `less_memory`), then shorter sequences: each alone where one is enough, else together. Empty where nothing of it
    fits. `limit_bytes` is as for `plan`.
    """
    setting = setting or this_setting(profile)
    capacity = _capacity(profile, limit_bytes, capacity)
    profile = settle(profile, capacity=capacity, setting=setting)
    try:
        now, _ = _components(profile, setting)
    except UnknownShapeError:
        return ()
    need = sum(now.values())
    red = capacity.judge(_in_mlx(now), need)[0] is Level.RED

    def first_that_fits(candidates: Iterable[tuple[str, ...]], worst: Level) -> Suggestion | None:
        for settings in candidates:
            changed = _with(profile, settings)
            components, _ = _components(changed, setting)
            less = sum(components.values())
            level, _ = capacity.judge(_in_mlx(components), less)
            if less < need and (level is None or list(Level).index(level) <= list(Level).index(worst)):
                words = [*_in_words(profile, changed, setting), *(meaning[it] for it in settings if it in meaning)]
                return Suggestion(settings, less, need - less, "; ".join(words))
        return None

    meaning = demand_of(profile).less_memory(profile)
    micro, others = list(_smaller_micro_batches(profile, setting)), tuple(meaning)
    shorter = list(_shorter_sequences(profile))
    smallest = micro[-1:]
    more_of_others = [others[:count] for count in range(1, len(others) + 1)]
    for enough in (Level.GREEN, Level.YELLOW) if red else (Level.GREEN,):  # with room to spare, or else at all
        ways = [micro, *([other] for other in others), shorter]
        alone = [first_that_fits([(change,) for change in way], enough) for way in ways]
        if found := [suggestion for suggestion in alone if suggestion]:
            return tuple(found)
        together = chain(
            ((change, *more) for more in more_of_others for change in micro),
            more_of_others,
            ((*smallest, *more, change) for more in [(), *more_of_others] for change in shorter),
        )
        if both := first_that_fits(together, enough):
            return (both,)
    return ()


def refuse_what_cannot_fit(plan: Plan) -> None:
    """Raises `UserError`, in one line with the nearest settings, where a run would need more than the machine has."""
    if plan.level is Level.RED:
        settings = " or ".join(suggestion.options for suggestion in plan.suggestions)
        advice = f"it fits with {settings}; " if settings else ""
        raise UserError(f"{plan.verdict}; {advice}run --anyway starts it all the same")


def profile_of(run: RunDirectory) -> Profile:
    """A run's profile as it is now, with what was changed since it began. Raises `UserError` in one line."""
    begun = validate_profile(run.identity()["profile"], where=str(run.identity_path))
    amendments, last = Amendments.of(begun, run), run.last("loss")
    return amendments.at((last[0] if last else 0) + 1).model_copy(update={"guard": amendments.guard()})


def _capacity(profile: Profile, limit_bytes: int | None, given: Capacity | None) -> Capacity:
    """What a run of a profile may use: of a limit, of what is given, or of this machine; and of its own limit."""
    capacity = Capacity(limit_bytes) if limit_bytes is not None else given or this_capacity()
    own = profile.guard.memory.limit_gb
    return capacity if own is None else replace(capacity, mlx_limit_bytes=int(own * 1e9))


def _components(profile: Profile, setting: Setting) -> tuple[dict[str, int], Moment]:
    """Everything in bytes at the largest moment of a step, and that moment."""
    moments = demand_of(profile).moments(profile, setting)
    peak = max(moments, key=lambda moment: moment.total_bytes)
    lasting = min(moment.total_bytes for moment in moments)
    coming_and_going = peak.total_bytes - lasting
    cache = _GPU_CACHE_SHARE * coming_and_going if setting.gpu else min(_CPU_CACHE_BYTES, peak.total_bytes)
    return {**peak.bytes, CACHE: round(cache), PROCESS: _PROCESS_BYTES}, peak


def _in_mlx(components: Mapping[str, int]) -> int:
    return sum(components[name] for name in IN_MLX if name in components)


def _activations(profile: Profile, setting: Setting) -> int:
    """The most that a micro-batch's activations and states take at any moment."""
    moments = demand_of(profile).moments(profile, setting)
    return max(moment.bytes.get(ACTIVATIONS, 0) + moment.bytes.get(STATES, 0) for moment in moments)


def _checkpointed(profile: Profile, on: bool) -> Profile:
    return profile.model_copy(update={"train": profile.train.model_copy(update={"gradient_checkpointing": on})})


def _smaller_micro_batches(profile: Profile, setting: Setting) -> Iterator[str]:
    size = micro_batch(profile, setting.ranks)
    while size > 1:
        size = size // 2
        yield f"train.micro_batch_size={size}"


def _shorter_sequences(profile: Profile) -> Iterator[str]:
    length = profile.train.sequence_length
    while length // 2 >= _SHORTEST:
        length //= 2
        yield f"train.sequence_length={length}"


def _with(profile: Profile, settings: Sequence[str]) -> Profile:
    for setting in settings:
        profile = with_override(profile, setting)
    return profile


def _in_words(profile: Profile, changed: Profile, setting: Setting) -> list[str]:
    """What a smaller part of a batch and shorter sequences mean."""
    words = []
    before, after = micro_batch(profile, setting.ranks), micro_batch(changed, setting.ranks)
    if after != before:
        times = micro_batches(changed, setting.ranks)
        words.append(f"micro-batch {before} → {after}, {times} of them a step: the same effective batch")
    if (length := changed.train.sequence_length) != profile.train.sequence_length:
        words.append(f"sequences of {length:,} instead of {profile.train.sequence_length:,} tokens: another training")
    return words


def _reason(components: Mapping[str, int], level: Level | None, why: str, *, fits: bool) -> str:
    if level in (Level.GREEN, None):
        return ""
    if level is Level.RED and not fits:
        bare = sum(components.get(name, 0) for name in (FROZEN, TRAINED, OPTIMIZER))
        return f"{why}, and weights and optimizer alone take {gigabytes(bare)}"
    return why


def _on_a_gpu(profile: Profile, setting: Setting, level: Level | None) -> str:
    """What it would need on a Mac, for who plans on a CPU, which computes in numbers twice as long."""
    if level in (Level.GREEN, None) or setting.gpu or profile.train.dtype != "auto":
        return ""
    components, _ = _components(profile, replace(setting, gpu=True, compute_bytes=2, metal=True))
    return f"; that is in float32, as CPUs compute: on a Mac's GPU, in bfloat16, {gigabytes(sum(components.values()))}"


def _verdict(need: int, capacity: Capacity, level: Level | None, why: str, *, fits: bool) -> str:
    needed = f"about {gigabytes(need)} are needed"
    if capacity.processes > 1:
        needed += f" by each of {capacity.processes} processes"
    if level is None:
        return f"unknown: {needed}; what this machine has is unknown"
    words = {Level.GREEN: "fits", Level.YELLOW: "tight", Level.RED: "does not fit" if fits else "nothing of this fits"}
    return f"{words[level]}: {needed}, {why}"
