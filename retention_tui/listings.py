"""Runs, profiles and findings as text or JSON on standard output."""

from __future__ import annotations

import csv
import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from engine.errors import UserError
from engine.events import plain
from engine.profile_files import list_profiles
from engine.runs import find_run, list_runs
from engine.store import RunDirectory, RunSummary


def print_profiles(as_json: bool) -> None:
    profiles = list_profiles()
    if as_json:
        _print_json([asdict(profile) for profile in profiles])
    else:
        _print_table(("profile", "kind", "what it is for"), [(p.name, p.kind, p.description) for p in profiles])


def print_runs(folder: Path, as_json: bool) -> None:
    summaries = list_runs(folder)
    if as_json:
        _print_json([asdict(summary) for summary in summaries])
    elif not summaries:
        print(f"no runs in {folder} yet; start one with: retention-tui run demo")
    else:
        header = ("run", "state", "step", "loss", "held-out", "last written")
        _print_table(header, [_row(summary) for summary in summaries])


def print_run(folder: Path, name: str, as_json: bool) -> None:
    from engine.checkpoint import best_checkpoint, list_checkpoints  # loads MLX
    from engine.report import changes
    from retention_tui.kinds import parameters, run_facts

    run = find_run(folder, name)
    summary, identity, checkpoints = run.summary(), run.identity(), list_checkpoints(run)
    best = best_checkpoint(checkpoints)
    events = run.events()
    alarms = [event for event in events if event["event"] == "alarm"]
    opened = next((event for event in reversed(events) if event["event"] == "run_opened"), None)
    if as_json:
        saved = [{"step": c.step, "attempt": c.attempt, "path": c.path, "best": c == best} for c in checkpoints]
        attempts = [asdict(attempt) for attempt in run.attempts()]
        _print_json(
            {**asdict(summary), "identity": identity, "attempts": attempts, "checkpoints": saved, "alarms": alarms}
        )
        return
    attempts_made = run.attempts()
    reason = attempts_made[-1].reason if attempts_made else ""
    size = f", {parameters(opened['parameters'], opened.get('trained_parameters'))}" if opened else ""
    lines = [
        ("run", f"{summary.name} ({summary.path})"),
        ("profile", f"{summary.profile}, {summary.kind}{size}"),
        *run_facts(identity["profile"], changes(identity)),
        ("state", summary.state + (f": {reason}" if reason else "")),
        ("step", f"{summary.step:,} of {summary.total_steps:,}, in {len(attempts_made)} attempt(s)"),
        ("loss", _number(summary.loss)),
        ("held-out loss", _number(summary.val_loss)),
        *[("checkpoint", f"{c.path.name}{'  best' if c == best else ''}") for c in checkpoints],
        *[("alarm", f"{_clock(event['time'])}  {event['text']}") for event in alarms[-10:]],
    ]
    width = max(len(label) for label, _ in lines)
    for label, text in lines:
        print(f"{label:<{width}}  {text}")


def print_report(folder: Path, name: str, as_json: bool) -> None:
    from engine.report import report
    from retention_tui.story import page

    story = report(find_run(folder, name))
    if as_json:
        stands = {"state": story.state, "reason": story.reason, "began": story.began, "last_sign": story.last_sign}
        _print_json({**asdict(story), **stands})
    else:
        print("\n".join(page(story)))


def export_run(folder: Path, name: str, form: str, output: Path | None) -> None:
    """One row for every step, first `step`, then one column a metric. Raises `UserError` for an unknown format."""
    writers: dict[str, Callable[[RunDirectory, IO[str]], None]] = {"csv": _write_csv, "jsonl": _write_jsonl}
    if form not in writers:
        raise UserError(f"--format {form!r} is not known; there are {', '.join(writers)}, adapters")
    run = find_run(folder, name)
    if output is None:
        writers[form](run, sys.stdout)
        return
    try:
        with output.open("w", encoding="utf-8", newline="") as file:
            writers[form](run, file)
    except OSError as error:
        raise UserError(f"{output} cannot be written: {error.strerror or error}") from None


def print_findings(runs_folder: Path, as_json: bool) -> None:
    from engine.doctor import diagnose  # loads MLX and measures

    findings = diagnose(runs_folder)
    if as_json:
        _print_json([asdict(finding) for finding in findings])
        return
    marks = {"ok": "✓", "warning": "!", "problem": "✗"}
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        print(f"{marks[finding.status]} {finding.name:<{width}}  {finding.value}")
        if finding.advice:
            print(f"  {'':<{width}}  → {finding.advice}")


def _write_csv(run: RunDirectory, file: IO[str]) -> None:
    names = run.metric_names()
    writer = csv.writer(file)
    writer.writerow(["step", *names])
    for step, values in run.rows():
        writer.writerow([step, *(repr(values[name]) if name in values else "" for name in names)])


def _write_jsonl(run: RunDirectory, file: IO[str]) -> None:
    for step, values in run.rows():
        file.write(json.dumps(plain({"step": step, **values}), allow_nan=False) + "\n")


def _row(summary: RunSummary) -> tuple[str, ...]:
    steps = f"{summary.step:,} of {summary.total_steps:,}"
    return (
        summary.name,
        summary.state,
        steps,
        _number(summary.loss),
        _number(summary.val_loss),
        _clock(summary.updated),
    )


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def _print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    table = [header, *rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(header))]
    for row in table:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())


def _print_json(value: Any) -> None:
    json.dump(plain(value), sys.stdout, indent=2, ensure_ascii=False, allow_nan=False, default=str)
    sys.stdout.write("\n")
