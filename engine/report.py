"""The story of a run, told from what it left on disk: how it began, what befell it, and how it ended."""

from __future__ import annotations

import itertools
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.amendments import ROLLBACK
from engine.events import Level, State
from engine.store import RunDirectory

INTERRUPTED = "interrupted"
"""The state of an attempt that broke off without a word: killed, or without power."""


@dataclass(frozen=True)
class Stretch:
    """One attempt as it went. Times are in seconds since the epoch; `last_sign` is when it was last heard of."""

    attempt: int
    from_step: int
    to_step: int
    began: float
    last_sign: float
    state: str
    reason: str

    @property
    def over(self) -> bool:
        return self.state == INTERRUPTED or State(self.state).final


@dataclass(frozen=True)
class Warned:
    """An alarm that was raised; `guard` is who raised it, or empty."""

    time: float
    level: str
    text: str
    guard: str = ""


@dataclass(frozen=True)
class Rest:
    """A pause, until `ended` or, where that is None, to the end of what is known; `reason` may be empty."""

    began: float
    ended: float | None
    reason: str


@dataclass(frozen=True)
class Change:
    """A setting that was changed while the run trained, in force after `from_step`."""

    from_step: int
    key: str
    value: str


@dataclass(frozen=True)
class Report:
    """All that happened to one run. None is unknown; sizes are in bytes."""

    name: str
    path: Path
    kind: str
    profile: str
    live: bool
    step: int
    total_steps: int
    settings: Mapping[str, Any]
    """The profile as the run began with it."""
    changes: list[Change]
    parameters: int | None
    trained_parameters: int | None
    device: str
    trained_seconds: float
    """Time spent on the steps that count: those of the present line, without pauses, validations and checkpoints."""
    stretches: list[Stretch]
    alarms: list[Warned]
    rests: list[Rest]
    loss: float | None
    val_loss: float | None
    best_val_loss: float | None
    best_step: int | None
    checkpoints_written: int
    peak_memory_bytes: float | None
    most_swap_bytes: int | None
    pressure_seconds: Mapping[str, int] = field(default_factory=dict)
    """How long memory pressure was green, yellow and red; empty where it was not watched."""

    @property
    def state(self) -> str:
        return self.stretches[-1].state if self.stretches else str(State.LOADING)

    @property
    def reason(self) -> str:
        return self.stretches[-1].reason if self.stretches else ""

    @property
    def began(self) -> float | None:
        return self.stretches[0].began if self.stretches else None

    @property
    def last_sign(self) -> float | None:
        return self.stretches[-1].last_sign if self.stretches else None


def report(run: RunDirectory) -> Report:
    """Reads a run's store. Raises `UserError` where it is damaged, or the folder is not a run."""
    identity, live, events = run.identity(), run.is_live(), run.events()
    stretches = _stretches(run, live)
    opened = next((event for event in reversed(events) if event["event"] == "run_opened"), None)
    best_step, best = _least(run, "val_loss")
    loss, val_loss, seconds = run.last("loss"), run.last("val_loss"), run.last("elapsed_seconds")
    swap, pressure = _machine(run)
    return Report(
        name=run.name,
        path=run.path,
        kind=str(identity["profile"]["kind"]),
        profile=str(identity["profile_name"]),
        live=live,
        step=loss[0] if loss else (stretches[-1].from_step if stretches else 0),
        total_steps=opened["total_steps"] if opened else 0,
        settings=identity["profile"],
        changes=changes(identity),
        parameters=opened["parameters"] if opened else None,
        trained_parameters=opened.get("trained_parameters") if opened else None,
        device=f"{opened['device']}, {opened['dtype']}" if opened else "",
        trained_seconds=seconds[1] if seconds else 0.0,
        stretches=stretches,
        alarms=[
            Warned(event["time"], event["level"], event["text"], event.get("guard", ""))
            for event in events
            if event["event"] == "alarm"
        ],
        rests=_rests(events),
        loss=loss[1] if loss else None,
        val_loss=val_loss[1] if val_loss else None,
        best_val_loss=best,
        best_step=best_step,
        checkpoints_written=sum(event["event"] == "checkpoint" for event in events),
        peak_memory_bytes=_most(run, "peak_memory_bytes"),
        most_swap_bytes=swap,
        pressure_seconds=pressure,
    )


def changes(identity: Mapping[str, Any]) -> list[Change]:
    """The settings that run.json says were changed while the run trained, by steps."""
    entries = [Change(entry["from_step"], entry["key"], entry["value"]) for entry in identity.get("amendments", ())]
    return sorted((entry for entry in entries if entry.key != ROLLBACK), key=lambda entry: entry.from_step)


def _stretches(run: RunDirectory, live: bool) -> list[Stretch]:
    with run.reader() as database:
        if database is None:
            return []
        rows = database.execute(
            "SELECT id, from_step, started, ended, state, reason FROM attempt ORDER BY id"
        ).fetchall()
        steps = {
            attempt: (step, moment)
            for attempt, step, moment in database.execute(
                "SELECT attempt, max(step), max(value) FROM value JOIN metric ON metric.id = value.metric"
                " WHERE metric.name = 'time' GROUP BY attempt"
            )
        }
        heard = dict(database.execute("SELECT attempt, max(time) FROM event GROUP BY attempt").fetchall())
    newest = rows[-1][0] if rows else 0
    stretches = []
    for attempt, from_step, started, ended, state, reason in rows:
        to_step, moment = steps.get(attempt, (from_step, started))
        going_on = live and attempt == newest
        stretches.append(
            Stretch(
                attempt=attempt,
                from_step=from_step,
                to_step=max(from_step, to_step),
                began=started,
                last_sign=ended or max(started, moment or started, heard.get(attempt, started)),
                state=state if going_on or State(state).final else INTERRUPTED,
                reason=reason if going_on or State(state).final else "",
            )
        )
    return stretches


def _rests(events: list[dict[str, Any]]) -> list[Rest]:
    """From each `paused` to the next state, or to what else shows that it was over."""
    rests = []
    told = [event for event in events if event["event"] in ("state", "run_opened", "run_ended")]
    for event, following in itertools.zip_longest(told, told[1:]):
        if event["event"] == "state" and event["state"] == State.PAUSED:
            if following is not None and following["event"] == "state" and following["state"] == State.PAUSED:
                continue  # said again, with another reason
            rests.append(Rest(event["time"], following["time"] if following else None, event["reason"]))
    return rests


def _least(run: RunDirectory, metric: str) -> tuple[int | None, float | None]:
    with run.reader() as database:
        query = "SELECT step, value FROM curve WHERE name = ? AND value IS NOT NULL ORDER BY value, step LIMIT 1"
        row = database.execute(query, (metric,)).fetchone() if database is not None else None
    return row or (None, None)


def _most(run: RunDirectory, metric: str) -> float | None:
    with run.reader() as database:
        if database is None:
            return None
        query = "SELECT max(value) FROM value JOIN metric ON metric.id = value.metric WHERE metric.name = ?"
        most: float | None = database.execute(query, (metric,)).fetchone()[0]
    return most


def _machine(run: RunDirectory) -> tuple[int | None, dict[str, int]]:
    """The most swap, and the seconds of each level of pressure: there is one reading a second."""
    with run.reader() as database:
        if database is None:
            return None, {}
        try:
            swap: int | None = database.execute("SELECT max(swap_bytes) FROM host").fetchone()[0]
            counted = dict(database.execute("SELECT level, count(*) FROM host GROUP BY level").fetchall())
        except sqlite3.OperationalError:  # from before the machine was watched
            return None, {}
    return swap, {str(level): counted[level] for level in Level if level in counted}
