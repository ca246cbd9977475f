"""A run's report in words: the whole story on a page, or in one line what befell it while its owner was away."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from engine.errors import UserError
from engine.events import State
from engine.report import INTERRUPTED, Report, Stretch, report
from engine.store import RunDirectory
from retention_tui import wording
from retention_tui.kinds import parameters, run_facts
from retention_tui.progress import Weight
from retention_tui.visits import last_look

_LINES_AT_FIRST, _LINES_AT_LAST = 8, 16
"""Of a longer story, what is told of its beginning and of its end."""


@dataclass(frozen=True, slots=True)
class News:
    """What became of one run, in one line; `time` is that of the newest of it, in seconds since the epoch."""

    time: float
    weight: Weight
    text: str


def while_away(runs_folder: Path, since: float = 0.0) -> list[News]:
    """What happened to the runs of a folder since a moment, and since somebody last looked: the gravest first, then the
    newest. Reads the disk."""
    since, news = max(since, last_look(runs_folder)), []
    for path in runs_folder.glob("[!.]*"):
        run = RunDirectory(path)
        try:
            seen = max(since, last_look(runs_folder, run.name))
            if run.last_written() > seen and (told := befallen(report(run), seen)):
                news.append(told)
        except (UserError, KeyError, TypeError, ValueError, OSError):  # damaged; the list of runs says so
            continue
    gravity = [Weight.GOOD, Weight.PLAIN, Weight.WARNING, Weight.CRITICAL]
    return sorted(news, key=lambda item: (max(1, gravity.index(item.weight)), item.time), reverse=True)


def befallen(story: Report, since: float, now: float | None = None) -> News | None:
    """What happened to one run since a moment, in one line; None for nothing."""
    alarms = [alarm for alarm in story.alarms if alarm.time > since and alarm.text not in story.reason]
    parts, weight, moment = [], Weight.GOOD, 0.0
    if story.stretches and story.stretches[-1].over and (story.last_sign or 0.0) > since:
        moment = story.last_sign or 0.0
        words, weight = _end(story)
        parts.append(words)
    if alarms:
        newest = alarms[-1]
        weight = weight if weight is Weight.CRITICAL else Weight.WARNING
        count = f"raised {len(alarms)} alarms, the last" if len(alarms) > 1 else "raised an alarm"
        parts.append(
            f"{count} at {wording.clock(newest.time, now=now)}: {newest.text}" if parts else f"{count}: {newest.text}"
        )
        moment = moment or newest.time
    if not parts:
        return None
    return News(moment, weight, wording.printable(" ".join(f"{story.name} {', '.join(parts)}".split())))


def _end(story: Report) -> tuple[str, Weight]:
    match story.state:
        case State.FINISHED:
            best = story.best_val_loss if story.best_val_loss is not None else story.val_loss
            score = f" (held-out {wording.number(best)})" if best is not None else ""
            return f"finished{score}", Weight.GOOD
        case State.STOPPED:
            return f"stopped: {story.reason}", Weight.PLAIN
        case State.FAILED:
            return f"failed: {story.reason}", Weight.CRITICAL
        case _:
            return f"broke off at step {story.step:,}: it can be resumed", Weight.CRITICAL


def page(story: Report) -> list[str]:
    """The whole story of one run, for a terminal or a mail."""
    head = f"{story.name}: {'live, ' if story.live else ''}{story.state} at step {story.step:,}"
    head += f" of {story.total_steps:,}" if story.total_steps else ""
    lines = [f"{head}{f': {story.reason}' if story.reason else ''}", ""]
    facts = list(_facts(story))
    lines += [f"{name:<13}  {said}" for name, said in facts]
    told = sorted(_told(story), key=lambda item: item[0])
    left_out = len(told) - _LINES_AT_FIRST - _LINES_AT_LAST
    if told:
        lines.append("")
    for index, (moment, said) in enumerate(told):
        if left_out > 1 and index == _LINES_AT_FIRST:
            lines.append(f"  … {left_out:,} more; all of them are in {story.path / 'log.txt'}")
        if left_out <= 1 or index < _LINES_AT_FIRST or index >= len(told) - _LINES_AT_LAST:
            lines.append(f"{_date(moment)}  {said}")
    return [wording.printable(line.replace("\n", " ").rstrip()) for line in lines]


def _facts(story: Report) -> Iterator[tuple[str, str]]:
    size = f", {parameters(story.parameters, story.trained_parameters)}" if story.parameters is not None else ""
    yield "profile", f"{story.profile}, {story.kind}{size}{f' on {story.device}' if story.device else ''}"
    yield "folder", str(story.path)
    yield from run_facts(story.settings, story.changes)
    if story.began is not None and story.last_sign is not None:
        yield "begun", _date(story.began)
        yield ("last heard of" if story.live or story.state == INTERRUPTED else "ended"), _date(story.last_sign)
    count = len(story.stretches)
    attempts = "1 attempt" if count == 1 else f"{count} attempts"
    rested = sum((rest.ended or rest.began) - rest.began for rest in story.rests)
    paused = f", paused for {wording.duration(rested)}" if story.rests else ""
    yield "trained", f"{wording.duration(story.trained_seconds)} in {attempts}{paused}"
    yield "loss", wording.number(story.loss)
    best = f", best {wording.number(story.best_val_loss)} at step {story.best_step:,}" if story.best_step else ""
    yield "held-out loss", f"{wording.number(story.val_loss)}{best}"
    memory = [f"{wording.size(story.peak_memory_bytes)} at its peak"]
    for level in ("yellow", "red"):
        if seconds := story.pressure_seconds.get(level):
            memory.append(f"pressure {level} for {wording.duration(seconds)}")
    if story.most_swap_bytes:
        memory.append(f"swap up to {wording.size(story.most_swap_bytes)}")
    yield "memory", ", ".join(memory)
    yield "checkpoints", f"{story.checkpoints_written:,} written"
    yield "alarms", f"{len(story.alarms):,}" if story.alarms else "none"


def _told(story: Report) -> Iterator[tuple[float, str]]:
    for stretch in story.stretches:
        yield stretch.began, _beginning(stretch)
        if stretch.over:
            yield stretch.last_sign, _ending(stretch)
    for alarm in story.alarms:
        yield alarm.time, f"{alarm.level}: {alarm.text}"
    for rest in story.rests:
        long = f" for {wording.duration(rest.ended - rest.began)}" if rest.ended is not None else ""
        yield rest.began, f"paused{long}{f': {rest.reason}' if rest.reason else ''}"


def _beginning(stretch: Stretch) -> str:
    return "began" if stretch.attempt == 1 else f"attempt {stretch.attempt} went on from step {stretch.from_step:,}"


def _ending(stretch: Stretch) -> str:
    if stretch.state == INTERRUPTED:
        return f"broke off after step {stretch.to_step:,}, without a word: killed, or without power"
    return f"{stretch.state} at step {stretch.to_step:,}{f': {stretch.reason}' if stretch.reason else ''}"


def _date(moment: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(moment))
