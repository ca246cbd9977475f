"""The run directory and its SQLite file: the truth about a run.

    runs/NAME/run.json        identity: resolved profile, versions, machine; written before data or model are touched
    runs/NAME/run.sqlite      attempts, metrics and events (WAL; `PRAGMA user_version` is the schema's version)
    runs/NAME/waiting.json    rows that run.sqlite has not taken yet, if any (engine.waiting)
    runs/NAME/checkpoints/    see engine.checkpoint
    runs/NAME/log.txt         what was said, and whatever libraries printed
    runs/NAME/lock            held with flock by the process that trains (engine.runs)

A run that is resumed goes on in a new *attempt*. The view `curve` is the current line: the newest attempt, before it
its parent up to the step where it began, and so on; rows that were left behind stay in the file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import math
import sqlite3
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.durable import write_json
from engine.errors import UserError
from engine.events import Event, Level, Reading, State, to_json
from engine.waiting import Row, WaitingRows

RUN_FORMAT = 1
SCHEMA_VERSION = 2
_PATIENCE_MILLISECONDS = 200  # training waits meanwhile, and rows can wait in memory
_LAST_PATIENCE_MILLISECONDS = 5000
_RETRY_SHARE = 0.05  # of the time, at most, for tries in vain: what waits grows, and so does a try
_READINGS = tuple(field.name for field in dataclasses.fields(Reading) if field.name != "time")
_HOST = f"CREATE TABLE host (time REAL PRIMARY KEY, {', '.join(_READINGS)}) WITHOUT ROWID;"
_SCHEMA = f"""
CREATE TABLE attempt (
    id INTEGER PRIMARY KEY, parent INTEGER REFERENCES attempt, from_step INTEGER NOT NULL, total_steps INTEGER NOT NULL,
    started REAL NOT NULL, ended REAL, state TEXT NOT NULL, reason TEXT NOT NULL DEFAULT '');
CREATE TABLE metric (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE);
CREATE TABLE value (
    attempt INTEGER NOT NULL REFERENCES attempt, step INTEGER NOT NULL, metric INTEGER NOT NULL REFERENCES metric,
    value REAL, is_nan INTEGER NOT NULL DEFAULT 0, PRIMARY KEY (attempt, metric, step)) WITHOUT ROWID;
CREATE TABLE event (
    id INTEGER PRIMARY KEY, attempt INTEGER REFERENCES attempt, time REAL NOT NULL, kind TEXT NOT NULL,
    body TEXT NOT NULL);
{_HOST}
CREATE VIEW line AS
    WITH RECURSIVE line(attempt, from_step, until_step) AS (
        SELECT id, from_step, 9223372036854775807 FROM attempt WHERE id = (SELECT max(id) FROM attempt)
        UNION ALL
        SELECT parent.id, parent.from_step, min(line.from_step, line.until_step)
        FROM line JOIN attempt child ON child.id = line.attempt JOIN attempt parent ON parent.id = child.parent)
    SELECT * FROM line;
CREATE VIEW curve AS
    SELECT value.step, metric.name, value.value, value.is_nan FROM line
    JOIN value ON value.attempt = line.attempt AND value.step > line.from_step AND value.step <= line.until_step
    JOIN metric ON metric.id = value.metric;
PRAGMA user_version = {SCHEMA_VERSION};
"""

_STATEMENTS = {  # each may be carried out twice
    "attempt": "INSERT OR IGNORE INTO attempt (id, parent, from_step, total_steps, started, state) "
    "VALUES (?, ?, ?, ?, ?, ?)",
    "state": "UPDATE attempt SET state = ?, reason = ?, ended = ? WHERE id = ?",
    "metric": "INSERT OR IGNORE INTO metric (id, name) VALUES (?, ?)",
    "value": "INSERT OR REPLACE INTO value (attempt, step, metric, value, is_nan) VALUES (?, ?, ?, ?, ?)",
    "event": "INSERT OR IGNORE INTO event (id, attempt, time, kind, body) VALUES (?, ?, ?, ?, ?)",
    "reading": f"INSERT OR REPLACE INTO host (time, {', '.join(_READINGS)}) VALUES (?{', ?' * len(_READINGS)})",
}


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
            if database is None or _schema_version(database, self.database_path) < 2:
                return []
            query = f"SELECT time, {', '.join(_READINGS)} FROM host WHERE time >= ? ORDER BY time"
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
        files = [path for path in (self.database_path, Path(f"{self.database_path}-wal")) if path.exists()]
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
            updated=max([path.stat().st_mtime for path in files], default=self.identity_path.stat().st_mtime),
            live=live,
        )

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

    @contextlib.contextmanager
    def reader(self) -> Iterator[sqlite3.Connection | None]:
        """A read-only connection for the calling thread, or None where nothing was stored yet."""
        if not self.database_path.exists():
            yield None
            return
        try:
            place = f"file:{_uri_path(self.database_path)}?mode=ro"
            with contextlib.closing(sqlite3.connect(place, uri=True, timeout=10)) as database:
                yield database if _schema_version(database, self.database_path) else None
        except sqlite3.Error as error:
            raise UserError(f"{self.database_path} cannot be read: {error}") from None


class StoreWriter:
    """The only writer of run.sqlite, owned by one thread.

    Rows wait in memory until SQLite has taken them, so that a full disk costs little but memory until there is room
    again: `flush` says what went wrong and is simply called again later. What SQLite still refuses when a checkpoint is
    written, or at the end, waits in a file beside it. Raises `UserError` for a file that is damaged or from a newer
    release, and where what has waited is still refused.
    """

    def __init__(self, run: RunDirectory) -> None:
        self._path = run.database_path
        self._waiting = WaitingRows(run.path)
        self._pending: list[Row] = self._waiting.take(_STATEMENTS)
        self._problem: str | None = None
        self._retry_at = 0.0
        self.attempt = self._parent = self._from_step = 0
        try:
            self._database = sqlite3.connect(run.database_path, timeout=10, isolation_level=None)
            version = _schema_version(self._database, run.database_path)
            if version == 0:
                self._database.executescript(f"BEGIN; {_SCHEMA} COMMIT;")
            elif version == 1:
                self._database.executescript(f"BEGIN; {_HOST} PRAGMA user_version = 2; COMMIT;")
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.execute("PRAGMA synchronous = NORMAL")
            self._database.execute(f"PRAGMA busy_timeout = {_PATIENCE_MILLISECONDS}")
            if problem := self._write():
                raise UserError(f"{run.database_path} cannot be written: {problem}")
            self._metrics: dict[str, int] = dict(self._database.execute("SELECT name, id FROM metric").fetchall())
            self._events: int = self._database.execute("SELECT coalesce(max(id), 0) FROM event").fetchone()[0]
        except sqlite3.Error as error:
            raise UserError(f"{run.database_path} cannot be used: {error}") from None

    def begin_attempt(self, from_step: int, total_steps: int, newest_known: int = 0) -> int:
        """Starts an attempt that goes on from `from_step` of the current line; returns its id (1 for the first).

        It is newer than all stored attempts and than `newest_known`, whose row may have been lost.
        """
        took = "SELECT attempt FROM line WHERE from_step < ? AND until_step >= ?"
        try:
            stored = self._database.execute("SELECT max(id) FROM attempt").fetchone()[0]
            row = self._database.execute(took, (from_step, from_step)).fetchone()
        except sqlite3.Error as error:
            raise UserError(f"{self._path} cannot be read: {error}") from None
        parent = max(stored or 0, self.attempt) or None  # this writer's last one may be waiting still
        self.attempt = max(parent or 0, newest_known) + 1
        self._from_step, self._parent = from_step, row[0] if row else self.attempt
        self._add("attempt", self.attempt, parent, from_step, total_steps, time.time(), str(State.LOADING))
        return self.attempt

    def set_state(self, state: State, reason: str = "") -> None:
        """Records the attempt's state; a final one ends it."""
        ended = time.time() if state.final else None
        self._add("state", str(state), reason, ended, self.attempt)

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds values of `step` to the attempt that took it; a NaN is kept as such."""
        attempt = self.attempt if step > self._from_step else self._parent
        for name, value in metrics.items():
            if name not in self._metrics:
                self._metrics[name] = len(self._metrics) + 1
                self._add("metric", self._metrics[name], name)
            self._add("value", attempt, step, self._metrics[name], float(value), int(math.isnan(value)))

    def record_event(self, event: Event) -> None:
        self._events += 1
        self._add("event", self._events, self.attempt or None, event.time, event.kind, to_json(event))

    def record_reading(self, reading: Reading) -> None:
        """Adds what was read of the machine; of two readings of one moment the later one stays."""
        self._add("reading", reading.time, *(getattr(reading, name) for name in _READINGS))

    def flush(self) -> str | None:
        """Writes what is waiting, in one transaction. Returns None, or why it could not be written yet.

        After a failure it tries again only some time later.
        """
        if self._problem and time.monotonic() < self._retry_at:
            return self._problem
        return self._write()

    def _write(self) -> str | None:
        started, self._problem = time.monotonic(), None
        if not self._pending:
            return None
        try:
            self._database.execute("BEGIN IMMEDIATE")
            for name, values in self._pending:
                self._database.execute(_STATEMENTS[name], values)
            self._database.execute("COMMIT")
        except sqlite3.Error as error:
            with contextlib.suppress(sqlite3.Error):
                self._database.execute("ROLLBACK")
            now = time.monotonic()
            self._problem, self._retry_at = str(error), now + (now - started) / _RETRY_SHARE
            return self._problem
        self._pending.clear()
        self._waiting.forget()
        return None

    def settle(self) -> str | None:
        """As `flush`, and puts all of it on the medium, in run.sqlite itself: a lost log (`-wal`) costs none of it.

        Never waits for a reader: where one is in the way, what remains is on the medium in the log alone.
        """
        if problem := self._write():
            self._waiting.keep(self._pending)
            return problem
        try:
            self._database.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
        except sqlite3.Error as error:
            return str(error)
        return None

    def close(self) -> str | None:
        """Writes what is waiting, now with patience. Returns None, or why not, and what becomes of it."""
        problem: str | None = "it cannot be closed"
        with contextlib.suppress(sqlite3.Error), contextlib.closing(self._database):
            self._database.execute(f"PRAGMA busy_timeout = {_LAST_PATIENCE_MILLISECONDS}")
            problem = self._write()
        if not self._pending:
            return None
        kept = self._waiting.keep(self._pending)
        fate = "waits in waiting.json until the run goes on" if kept else "is lost"
        return f"{problem}; what waited for it in memory {fate}"

    def _add(self, statement: str, *values: Any) -> None:
        self._pending.append((statement, values))


def _schema_version(database: sqlite3.Connection, path: Path) -> int:
    version: int = database.execute("PRAGMA user_version").fetchone()[0]
    if version > SCHEMA_VERSION:
        raise UserError(f"{path} has schema {version}; this release reads up to {SCHEMA_VERSION}")
    return version


def _reading(row: tuple[Any, ...]) -> Reading:
    values = dict(zip(("time", *_READINGS), row, strict=True))
    flags = {name: None if values[name] is None else bool(values[name]) for name in ("on_mains", "lid_closed")}
    return Reading(**{**values, **flags, "level": None if values["level"] is None else Level(values["level"])})


def _number(value: float | None, is_nan: int) -> float:
    return math.nan if is_nan or value is None else value


def _uri_path(path: Path) -> str:
    return str(path.resolve()).replace("%", "%25").replace("?", "%3f").replace("#", "%23")
