"""The run directory and its SQLite file: the truth about a run.

runs/NAME/run.json        identity: resolved profile, versions, machine; written before data or model are touched
runs/NAME/run.sqlite      attempts, metrics and events (WAL; engine.schema has its tables)
runs/NAME/waiting.json    rows that run.sqlite has not taken yet, if any (engine.waiting)
runs/NAME/checkpoints/    see engine.checkpoint
runs/NAME/log.txt         what was said, and whatever libraries printed
runs/NAME/lock            held with flock by the process that trains (engine.runs)
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.durable import write_json
from engine.errors import UserError
from engine.events import Level, Reading, State
from engine.schema import READINGS, schema_version

RUN_FORMAT = 1


@dataclass(frozen=True)
class RunSummary:
    """One run as a list shows it. `updated` is in seconds since the epoch; `state` is a word."""

    name: str
    path: Path
    kind: str
    profile: str
    state: str
    step: int
    total_steps: int
    loss: float | None
    val_loss: float | None
    updated: float
    live: bool


@dataclass(frozen=True)
class Attempt:
    """One stretch of training: from `from_step`, which belongs to `parent`, until it ended."""

    id: int
    parent: int | None
    from_step: int
    total_steps: int
    state: str
    reason: str


class RunDirectory:
    """A run's folder. Reading needs no lock and works from any thread, also while another process trains."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def identity_path(self) -> Path:
        return self.path / "run.json"

    @property
    def database_path(self) -> Path:
        return self.path / "run.sqlite"

    @property
    def log_path(self) -> Path:
        return self.path / "log.txt"

    @property
    def lock_path(self) -> Path:
        return self.path / "lock"

    @property
    def checkpoints_path(self) -> Path:
        return self.path / "checkpoints"

    def identity(self) -> dict[str, Any]:
        """run.json. Raises `UserError` where it is missing, damaged or from a newer release."""
        try:
            identity: dict[str, Any] = json.loads(self.identity_path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"{self.path} is not a run: it has no run.json") from None
        except (OSError, ValueError) as error:
            raise UserError(f"{self.identity_path} cannot be read: {error}") from None
        if not isinstance(identity, dict) or not isinstance(identity.get("format"), int):
            raise UserError(f"{self.identity_path} is not a run's identity: it has no format number")
        if identity["format"] > RUN_FORMAT:
            raise UserError(
                f"{self.identity_path} has format {identity['format']}; this release reads up to {RUN_FORMAT}"
            )
        return identity

    def update_identity(self, **entries: Any) -> None:
        """Adds entries to run.json, atomically. Raises `UserError` where it cannot be read or written."""
        try:
            write_json(self.identity_path, {**self.identity(), **entries})
        except OSError as error:
            raise UserError(f"{self.identity_path} cannot be written: {error.strerror or error}") from None

    def curve(self, metric: str) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Steps and values of one metric on the current line, in order of steps."""
        rows: list[tuple[int, float | None, int]] = []
        with self.reader() as database:
            if database is not None:
                query = "SELECT step, value, is_nan FROM curve WHERE name = ? ORDER BY step"
                rows = database.execute(query, (metric,)).fetchall()
        steps = np.fromiter((row[0] for row in rows), np.int64, len(rows))
        return steps, np.fromiter((_number(row[1], row[2]) for row in rows), np.float64, len(rows))

    def last(self, metric: str) -> tuple[int, float] | None:
        """The newest step and value of one metric on the current line."""
        with self.reader() as database:
            if database is None:
                return None
            query = "SELECT step, value, is_nan FROM curve WHERE name = ? ORDER BY step DESC LIMIT 1"
            row = database.execute(query, (metric,)).fetchone()
            return None if row is None else (row[0], _number(row[1], row[2]))

    def tail(self, metric: str, count: int) -> dict[int, float]:
        """The newest values of one metric on the current line, `count` at most, by their steps, the newest first."""
        with self.reader() as database:
            if database is None:
                return {}
            query = "SELECT step, value, is_nan FROM curve WHERE name = ? ORDER BY step DESC LIMIT ?"
            return {row[0]: _number(row[1], row[2]) for row in database.execute(query, (metric, count))}

    def rows(self) -> Iterator[tuple[int, dict[str, float]]]:
        """Every step of the current line with all that was measured there."""
        with self.reader() as database:
            if database is None:
                return
            step, values = 0, dict[str, float]()
            for row in database.execute("SELECT step, name, value, is_nan FROM curve ORDER BY step"):
                if values and row[0] != step:
                    yield step, values
                    values = {}
                step = row[0]
                values[row[1]] = _number(row[2], row[3])
            if values:
                yield step, values

    def metric_names(self) -> list[str]:
        """All metrics that the run has ever stored, in the order in which they appeared."""
        with self.reader() as database:
            if database is None:
                return []
            return [row[0] for row in database.execute("SELECT name FROM metric ORDER BY id")]

    def events(self) -> list[dict[str, Any]]:
        """All stored events of all attempts, oldest first, as `engine.events.to_json` gives them."""
        with self.reader() as database:
            if database is None:
                return []
            return [json.loads(row[0]) for row in database.execute("SELECT body FROM event ORDER BY id")]

    def readings(self, since: float = 0.0) -> list[Reading]:
        """What was read of the machine from a moment on (seconds since the epoch), oldest first."""
        with self.reader() as database:
            if database is None or schema_version(database, self.database_path) < 2:
                return []
            query = f"SELECT time, {', '.join(READINGS)} FROM host WHERE time >= ? ORDER BY time"
            return [_reading(row) for row in database.execute(query, (since,))]

    def attempts(self) -> list[Attempt]:
        """All attempts, oldest first."""
        with self.reader() as database:
            if database is None:
                return []
            query = "SELECT id, parent, from_step, total_steps, state, reason FROM attempt ORDER BY id"
            return [Attempt(*row) for row in database.execute(query)]

    def summary(self) -> RunSummary:
        """Where the run stands. Raises `UserError` where the folder is not a run."""
        identity = self.identity()
        attempts = self.attempts()
        live = self.is_live()
        state = attempts[-1].state if attempts else str(State.LOADING)
        if not live and not State(state).final:
            state = "interrupted"
        loss, val_loss = self.last("loss"), self.last("val_loss")
        return RunSummary(
            name=self.name,
            path=self.path,
            kind=str(identity["profile"]["kind"]),
            profile=str(identity["profile_name"]),
            state=state,
            step=loss[0] if loss else (attempts[-1].from_step if attempts else 0),
            total_steps=attempts[-1].total_steps if attempts else 0,
            loss=loss[1] if loss else None,
            val_loss=val_loss[1] if val_loss else None,
            updated=self.last_written(),
            live=live,
        )

    def last_written(self) -> float:
        """When the run last wrote something, in seconds since the epoch; 0 where it has nothing yet."""
        newest = 0.0
        for path in (self.identity_path, self.database_path, Path(f"{self.database_path}-wal"), self.log_path):
            with contextlib.suppress(OSError):
                found = path.stat()
                if found.st_size:  # who only looks at a run leaves an empty -wal behind
                    newest = max(newest, found.st_mtime)
        return newest

    def is_live(self) -> bool:
        """True while some process holds the run's lock."""
        try:
            with self.lock_path.open("rb") as probe:
                fcntl.flock(probe, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def _open(self) -> sqlite3.Connection:
        place = f"file:{_uri_path(self.database_path)}?mode=ro"
        database = sqlite3.connect(place, uri=True, timeout=10)
        try:
            database.execute("PRAGMA user_version").fetchone()
        except sqlite3.OperationalError:  # a medium that cannot be written, where SQLite cannot read its own log
            database.close()
            database = sqlite3.connect(f"{place}&immutable=1", uri=True, timeout=10)
        return database

    @contextlib.contextmanager
    def reader(self) -> Iterator[sqlite3.Connection | None]:
        """A read-only connection for the calling thread, or None where nothing was stored yet."""
        if not self.database_path.exists():
            yield None
            return
        try:
            with contextlib.closing(self._open()) as database:
                yield database if schema_version(database, self.database_path) else None
        except sqlite3.Error as error:
            raise UserError(f"{self.database_path} cannot be read: {error}") from None


def _reading(row: tuple[Any, ...]) -> Reading:
    values = dict(zip(("time", *READINGS), row, strict=True))
    flags = {name: None if values[name] is None else bool(values[name]) for name in ("on_mains", "lid_closed")}
    return Reading(**{**values, **flags, "level": None if values["level"] is None else Level(values["level"])})


def _number(value: float | None, is_nan: int) -> float:
    return math.nan if is_nan or value is None else value


def _uri_path(path: Path) -> str:
    return str(path.resolve()).replace("%", "%25").replace("?", "%3f").replace("#", "%23")
