"""Where on the axis of steps something happened: checkpoints and alarms, as all charts of a run mark them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import Enum

import numpy as np

from engine.store import RunDirectory

MARKS_KEPT = 2000


class MarkKind(Enum):
    CHECKPOINT = "checkpoint"
    WARNING = "warning"
    CRITICAL = "critical"

    @classmethod
    def of_alarm(cls, level: str) -> MarkKind:
        return cls.CRITICAL if level == "critical" else cls.WARNING


@dataclass(frozen=True, slots=True)
class Mark:
    """Something that happened after `step`."""

    step: int
    kind: MarkKind


def gone_back(marks: Iterable[Mark], step: int) -> list[Mark]:
    """The marks of a run that has gone back to `step`: its checkpoints beyond are left behind, alarms stay in sight."""
    return [
        mark if mark.step <= step else replace(mark, step=step)
        for mark in marks
        if mark.step <= step or mark.kind is not MarkKind.CHECKPOINT
    ]


def load_marks(run: RunDirectory, before: float) -> list[Mark]:
    """What the store knows of a run until a moment, in seconds since the epoch; an alarm is put where its time was on
    the current line. Reads the disk: never on the UI thread."""
    steps, times = run.curve("time")
    marks: list[Mark] = []
    for event in run.events():
        if event["time"] >= before:
            continue
        if event["event"] == "run_opened":
            marks = gone_back(marks, event["step"])
        elif event["event"] == "checkpoint":
            marks.append(Mark(event["step"], MarkKind.CHECKPOINT))
        elif event["event"] == "alarm":
            index = int(np.searchsorted(times, event["time"])) - 1
            marks.append(Mark(int(steps[index]) if index >= 0 else 0, MarkKind.of_alarm(event["level"])))
    return marks[-MARKS_KEPT:]
