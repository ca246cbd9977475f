"""A plan in words: what `plan` prints, and what screens say of it. It reads the table that `plan --json` gives."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.errors import UserError
from engine.events import Level, plain
from engine.profile import Profile
from engine.profile_files import load_profile
from engine.store import RunDirectory
from retention_tui import wording

Table = Mapping[str, Any]

NAMES = {
    "frozen_weights": "frozen weights",
    "trained_weights": "trained weights",
    "compute_copies": "copies to compute with",
    "optimizer_state": "optimizer state",
    "gradients": "gradients",
    "activations": "activations",
    "logits_and_loss": "logits and loss",
    "retention_states": "retention states",
    "update": "the update",
    "data": "data",
    "allocator_cache": "allocator's cache",
    "rest_of_process": "rest of the process",
}
"""What the components are called."""

_MEASURED = {
    "trained_weights": "trained_weight_bytes",
    "optimizer_state": "optimizer_bytes",
    "allocator_cache": "cache_bytes",
}
"""The components that a measured step tells one by one."""

MOMENTS = {
    "loss": "the loss, at the end of the forward pass",
    "backward, last layer": "the backward pass, at its beginning (the last layer)",
    "backward, first layer": "the backward pass, at its end (the first layer)",
    "backward, a layer": "the backward pass, in a layer",
    "backward, attention": "the backward pass, in a layer's attention",
    "forward, attention": "attention, forward",
    "forward, mlp": "the MLPs, forward",
    "backward, retention": "the backward pass, in a layer's retention",
    "backward, mlp": "the backward pass, in a layer's MLP",
    "update": "the update of the weights",
}
"""What the moments of a step are called."""

ROUGHLY = 2**0.5
"""An estimate from another shape may be off by this factor, either way."""

_BESIDE_MLX = ("allocator_cache", "rest_of_process")
_UNITS = ((86400, "days"), (3600, "h"), (60, "min"), (1, "s"))
_YEAR_SECONDS = 365 * 86400


def print_plan(
    name: str, overrides: Sequence[str], runs_folder: Path, *, measured: bool = False, as_json: bool = False
) -> None:
    """Plans a profile, given by name or file, or a run, given by its folder; `measured` takes real steps first."""
    from dataclasses import replace  # what follows loads MLX

    from engine.planner import plan
    from engine.planning.measure import measure
    from engine.planning.report import as_table

    profile, run = _profile(name, overrides)
    # A screen sets the plan beside the run's own pace, so that it must not come from there.
    made = plan(profile, runs_folder=runs_folder, except_run=run.name if run and as_json else None)
    if run is not None and (attempts := run.attempts()):  # it has read its data, and knows
        made = replace(made, timing=replace(made.timing, steps=attempts[-1].total_steps or made.timing.steps))
    figures = None
    if measured:
        if not made.components:
            raise UserError(f"{made.verdict}; so nothing can be measured")
        if made.level is Level.RED:  # to try it would take down whatever else runs here
            raise UserError(f"{made.verdict}; so it is not measured")
        figures = measure(made.profile)
        timing = replace(
            made.timing, seconds_a_step=figures.seconds_a_step, source="measured", samples=figures.steps
        )  # fmt: skip
        made = replace(made, timing=timing)
    table = as_table(made, figures)
    if as_json:
        json.dump(plain(table), sys.stdout, indent=2, ensure_ascii=False, allow_nan=False)
        sys.stdout.write("\n")
    else:
        sys.stdout.write("".join(f"{line}\n" for line in lines(table)))


def lines(table: Table) -> list[str]:
    """The whole plan, for a terminal or a file."""
    if not table["components"]:
        return [f"{name:<12} {said}" for name, said in facts(table)]
    measured: Table = table.get("measured", {})
    told = [f"{'':<26}{'predicted':>11}" + (f"{'measured':>11}" if measured else "")]
    told += [_row(NAMES[name], size, measured.get(_MEASURED.get(name, ""))) for name, size in shares(table)]
    beside = len([name for name, _ in shares(table) if name in _BESIDE_MLX])
    told.insert(len(told) - beside, _row("MLX's peak", table["predicted_peak_bytes"], measured.get("peak_bytes")))
    told.append(_row("all of the process", table["need_bytes"], measured.get("process_peak_bytes")))
    told += [f"({moment_words(table)})", ""]
    if table["savings"]:
        told.append("what measures save, and in brackets what others would")
        told += [f"{name:<26}{size:>11}  {words}" for name, size, words in savings(table)]
        told.append("")
    return [*told, *(f"{name:<12} {said}" for name, said in facts(table))]


def savings(table: Table) -> list[tuple[str, str, str]]:
    """What each measure against memory saves, those that are not taken in brackets: name, size, what it is about."""
    sizes = {True: "{}", False: "({})"}
    return [
        (saving["name"], sizes[saving["taken"]].format(wording.size(saving["bytes"])), saving["words"])
        for saving in sorted(table["savings"], key=lambda saving: not saving["taken"])
    ]


def facts(table: Table, time_said: str = "") -> list[tuple[str, str]]:
    """Verdict, time and what else there is to say, each with its name; `time_said` is what is known better of time."""
    size, alternatives = wording.size, table["activations"]
    told = [
        ("memory", f"{dot(table['verdict'])} {_verdict(table)}"),
        ("time", time_said or time_words(table["time"])),
    ]
    if table["kind"] == "lora" and table["time"]["source"] == "measured" and not time_said:
        told.append(("", "measured with rows as long as they may be; yours are shorter, and take less"))
    told.append(("step", step_words(table)))
    if table["components"] and table["backward"] == "whole":
        other = "without" if alternatives["gradient_checkpointing"] else "with"
        others = size(alternatives[f"{other}_gradient_checkpointing"])
        told.append(("activations", f"of a micro-batch, {other} gradient checkpointing: {others}"))
    if table["download_bytes"]:
        told.append(("download", f"about {size(table['download_bytes'])}: the base is not here yet"))
    for index, suggestion in enumerate(table["suggestions"]):
        saved = f"saves {size(suggestion['saving_bytes'])}: {size(suggestion['need_bytes'])} in all"
        told.append(("or" if index else "what fits", f"{suggestion['options']}"))
        told.append(("", f"{saved}; {suggestion['words']}"))
    return told


def dot(verdict: str) -> str:
    """What stands before a verdict: full where there is one."""
    return "○" if verdict == "unknown" else "●"


def _verdict(table: Table) -> str:
    verdict, sentence = table["verdict"], table["sentence"]
    return str(sentence) if verdict == "unknown" else f"{verdict}, {sentence}"


def moment_words(table: Table) -> str:
    """Which moment of a step the components are those of."""
    return f"at the largest moment of a step: {MOMENTS.get(table['moment'], table['moment'])}"


def shares(table: Table) -> list[tuple[str, int]]:
    """The components that take anything, in the order in which they are told."""
    return [(name, table["components"][name]) for name in NAMES if table["components"].get(name)]


def step_words(table: Table) -> str:
    """`4 micro-batches of 8 sequences, layer by layer`."""
    parts, at_once = table["accumulation"], table["micro_batch_size"]
    sequences = f"{at_once:,} sequence" + ("s" if at_once != 1 else "")
    way = ", layer by layer" if table["backward"] == "layerwise" else ""
    return f"{sequences} at once{way}" if parts == 1 else f"{parts:,} micro-batches of {sequences}{way}"


def time_words(timing: Table, measures: str = "--measure") -> str:
    """`about 6 h 40 m from 9 measured steps: ends 06:42`, or `about 18 of 468 steps by 07:00: too few`.

    `measures` is the option or the key that has steps measured.
    """
    pace = timing["seconds_a_step"]
    if pace is None:
        return f"unknown until steps are measured: {measures} does that"
    source = {
        "measured": f"from {_steps(timing['samples'])} measured",
        "earlier runs": f"from {_steps(timing['samples'])} of an earlier run",
        "estimate": f"a rough estimate from a run of another shape; {measures} knows better",
    }[timing["source"]]
    rough = timing["source"] == "estimate"
    steps, within, seconds = timing["steps"], timing["steps_within_limit"], timing["seconds"]
    if within is not None and (steps is None or within < steps):
        most = within * ROUGHLY if steps is None else min(within * ROUGHLY, steps)
        if round(most if rough else within) == 0:
            return f"not one step {timing['limit']}, {source}"
        done = f"{within / ROUGHLY:,.0f} to {most:,.0f}" if rough else f"about {within:,}"
        if steps is None:
            return f"{done} steps {timing['limit']}, {source}"
        perhaps = "perhaps " if rough and most == steps else ""
        return f"{done} of {steps:,} steps {timing['limit']}: {perhaps}too few, {source}"
    if seconds is None:
        said = _range(pace) if rough else f"about {_pace(pace)}"
        return f"{said} a step, {source}; how many steps, the data will tell"
    if seconds > _YEAR_SECONDS:
        return f"more than a year, {source}"
    if rough:
        late = within is not None and timing["ends"] + (ROUGHLY - 1) * seconds > timing["limit_at"]
        perhaps = f", perhaps not all of it {timing['limit']}" if late else ""
        return f"{_range(seconds)}{perhaps}, {source}"
    ends = wording.clock(timing["ends"])
    if seconds > 6 * 86400:
        ends = time.strftime("%d %B", time.localtime(timing["ends"]))
    return f"about {wording.duration(seconds)}: ends {ends}, {source}"


def _range(seconds: float) -> str:
    """`15 to 30 h`: what a rough estimate may mean, in two figures and one unit."""
    least, most = seconds / ROUGHLY, seconds * ROUGHLY
    size, unit = next(((size, unit) for size, unit in _UNITS if most >= 2 * size), _UNITS[-1])
    return f"{_two_figures(least / size)} to {_two_figures(most / size)} {unit}"


def _two_figures(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def _pace(seconds: float) -> str:
    return wording.duration(seconds) if seconds >= 10 else f"{seconds:.2g} s"


def _steps(count: int) -> str:
    return "1 step" if count == 1 else f"{count:,} steps"


def _row(name: str, size: int, measured: int | None) -> str:
    row = f"{name:<26}{wording.size(size):>11}"
    return row if measured is None else f"{row}{wording.size(measured):>11}{size / measured:>8.2f} ×"


def _profile(name: str, overrides: Sequence[str]) -> tuple[Profile, RunDirectory | None]:
    """A profile, or that of a run, as it is now, and the run."""
    if not (Path(name) / "run.json").is_file():
        return load_profile(name, overrides), None
    if overrides:
        raise UserError("--set is for profiles; a run is planned as it is")
    from engine.planner import profile_of

    run = RunDirectory(Path(name).resolve())
    return profile_of(run), run
