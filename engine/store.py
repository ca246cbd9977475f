"""The run directory and its SQLite file: the truth about a run.

    runs/NAME/run.json        identity: resolved profile, versions, machine; written before data or model are touched
    runs/NAME/run.sqlite      attempts, metrics and events (WAL; `PRAGMA user_version` is the schema's version)
    runs/NAME/checkpoints/    see engine.checkpoint
    runs/NAME/log.txt         what was said, and whatever libraries printed
    runs/NAME/lock            held with flock by the process that trains

A run that is resumed goes on in a new *attempt*. The view `curve` is the current line: the newest attempt, before it
its parent up to the step where it began, and so on; rows that were left behind stay in the file.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import re
import sqlite3
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import UserError
from engine.events import Event, State, to_json

RUN_FORMAT = 1
SCHEMA_VERSION = 1
_PATIENCE_MILLISECONDS = 200  # training waits meanwhile, and rows can wait in memory
_LAST_PATIENCE_MILLISECONDS = 5000
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

    Rows wait in memory until SQLite has taken them, so that a full disk costs nothing but memory until there is room
    again: `flush` says what went wrong and is simply called again later. Raises `UserError` for a file that is damaged
    or from a newer release.
    """

    def __init__(self, run: RunDirectory) -> None:
        self._pending: list[tuple[str, tuple[Any, ...]]] = []
        self.attempt = self._parent = self._from_step = 0
        try:
            self._database = sqlite3.connect(run.database_path, timeout=10, isolation_level=None)
            if _schema_version(self._database, run.database_path) == 0:
                self._database.executescript(f"BEGIN; {_SCHEMA} COMMIT;")
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.execute("PRAGMA synchronous = NORMAL")
            self._database.execute(f"PRAGMA busy_timeout = {_PATIENCE_MILLISECONDS}")
            self._metrics: dict[str, int] = dict(self._database.execute("SELECT name, id FROM metric").fetchall())
        except sqlite3.Error as error:
            raise UserError(f"{run.database_path} cannot be used: {error}") from None

    def begin_attempt(self, from_step: int, total_steps: int, newest_known: int = 0) -> int:
        """Starts an attempt that goes on from `from_step` of the current line; returns its id (1 for the first).

        It is newer than all stored attempts and than `newest_known`, whose row may have been lost.
        """
        parent = self._database.execute("SELECT max(id) FROM attempt").fetchone()[0]
        self.attempt = max(parent or 0, newest_known) + 1
        took = "SELECT attempt FROM line WHERE from_step < ? AND until_step >= ?"
        row = self._database.execute(took, (from_step, from_step)).fetchone()
        self._from_step, self._parent = from_step, row[0] if row else self.attempt
        self._add(
            "INSERT INTO attempt (id, parent, from_step, total_steps, started, state) VALUES (?, ?, ?, ?, ?, ?)",
            (self.attempt, parent, from_step, total_steps, time.time(), str(State.LOADING)),
        )
        return self.attempt

    def set_state(self, state: State, reason: str = "") -> None:
        """Records the attempt's state; a final one ends it."""
        ended = time.time() if state.final else None
        self._add(
            "UPDATE attempt SET state = ?, reason = ?, ended = ? WHERE id = ?",
            (str(state), reason, ended, self.attempt),
        )

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds values of `step` to the attempt that took it; a NaN is kept as such."""
        attempt = self.attempt if step > self._from_step else self._parent
        for name, value in metrics.items():
            if name not in self._metrics:
                self._metrics[name] = len(self._metrics) + 1
                self._add("INSERT INTO metric (id, name) VALUES (?, ?)", (self._metrics[name], name))
            row = (attempt, step, self._metrics[name], float(value), int(math.isnan(value)))
            self._add("INSERT OR REPLACE INTO value (attempt, step, metric, value, is_nan) VALUES (?, ?, ?, ?, ?)", row)

    def record_event(self, event: Event) -> None:
        self._add(
            "INSERT INTO event (attempt, time, kind, body) VALUES (?, ?, ?, ?)",
            (self.attempt or None, event.time, event.kind, to_json(event)),
        )

    def flush(self) -> str | None:
        """Writes what is waiting, in one transaction. Returns None, or why it could not be written yet."""
        if not self._pending:
            return None
        try:
            self._database.execute("BEGIN IMMEDIATE")
            for statement, row in self._pending:
                self._database.execute(statement, row)
            self._database.execute("COMMIT")
        except sqlite3.Error as error:
            with contextlib.suppress(sqlite3.Error):
                self._database.execute("ROLLBACK")
            return str(error)
        self._pending.clear()
        return None

    def close(self) -> str | None:
        """Writes what is waiting, now with patience. Returns None, or why all of that is lost."""
        with contextlib.suppress(sqlite3.Error), contextlib.closing(self._database):
            self._database.execute(f"PRAGMA busy_timeout = {_LAST_PATIENCE_MILLISECONDS}")
            return self.flush()
        return "it cannot be closed"

    def _add(self, statement: str, row: tuple[Any, ...]) -> None:
        self._pending.append((statement, row))


class RunLock:
    """The right to train in a run directory: an flock, so it ends with the process that holds it."""

    def __init__(self, run: RunDirectory) -> None:
        try:
            self._file: IO[bytes] = run.lock_path.open("ab")
        except OSError as error:
            raise UserError(f"{run.lock_path} cannot be written: {error.strerror or error}") from None
        deadline = time.monotonic() + 1.0
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:  # shorter: someone only looked whether the run is live
                    self._file.close()
                    raise UserError(
                        f"run {run.name} is being trained by another process; stop that one first"
                    ) from None
                time.sleep(0.02)

    def release(self) -> None:
        self._file.close()


_NAME = re.compile(r"[^\s/\\\x00-\x1f.][^/\\\x00-\x1f]{0,99}")


def create_run(folder: Path, profile_name: str, identity: Mapping[str, Any], name: str | None = None) -> RunDirectory:
    """Makes the directory of a new run and writes its run.json.

    Without a name the run is called after its profile: PROFILE, PROFILE-2, PROFILE-3 …
    Raises `UserError` where the name is taken or cannot be a folder's name, or the folder cannot be written.
    """
    if name is not None and not _NAME.fullmatch(name):
        raise UserError(f"run name {name!r} cannot be used: no slash, no leading dot or space, at most 100 characters")
    number = 1
    try:
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            candidate = name or (profile_name if number == 1 else f"{profile_name}-{number}")
            run = RunDirectory(folder / candidate)
            try:
                run.path.mkdir()
                break
            except FileExistsError:
                if name is not None:
                    raise UserError(
                        f"run {name} exists already in {folder}; choose another --name, "
                        f"or go on with it: retention-tui resume {name}"
                    ) from None
                number += 1
        head = {"format": RUN_FORMAT, "name": run.name, "profile_name": profile_name}
        write_json(run.identity_path, {**head, **identity})
    except OSError as error:
        raise UserError(f"runs folder {folder} cannot be written: {error.strerror or error}") from None
    return run


def find_run(folder: Path, name_or_path: str) -> RunDirectory:
    """A run given by name (in `folder`) or by path. Raises `UserError` naming what there is."""
    for path in (folder / name_or_path, Path(name_or_path)):
        if (path / "run.json").is_file():
            return RunDirectory(path.resolve())
    names = [summary.name for summary in list_runs(folder)]
    known = f"there are {', '.join(names[:8])}" if names else "there are no runs yet"
    raise UserError(f"run {name_or_path!r} is not in {folder}; {known}")


def list_runs(folder: Path) -> list[RunSummary]:
    """All readable runs of a folder, the most recently written first."""
    summaries = []
    for path in folder.iterdir() if folder.is_dir() else ():
        with contextlib.suppress(UserError, KeyError, TypeError, ValueError, OSError):
            summaries.append(RunDirectory(path).summary())
    return sorted(summaries, key=lambda summary: summary.updated, reverse=True)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON whole or not at all: to a neighbour, synced, then renamed."""
    neighbour = path.with_name(f".{path.name}.{os.getpid()}")
    with neighbour.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")
        file.flush()
        sync(file.fileno())
    neighbour.replace(path)


def sync(descriptor: int) -> None:
    """Waits until a file or folder is on the medium. On macOS a plain fsync ends at the drive's cache."""
    if (full := getattr(fcntl, "F_FULLFSYNC", None)) is not None:
        with contextlib.suppress(OSError):  # not every file system has it
            fcntl.fcntl(descriptor, full)
            return
    os.fsync(descriptor)


def _schema_version(database: sqlite3.Connection, path: Path) -> int:
    version: int = database.execute("PRAGMA user_version").fetchone()[0]
    if version > SCHEMA_VERSION:
        raise UserError(f"{path} has schema {version}; this release reads up to {SCHEMA_VERSION}")
    return version


def _number(value: float | None, is_nan: int) -> float:
    return math.nan if is_nan or value is None else value


def _uri_path(path: Path) -> str:
    return str(path.resolve()).replace("%", "%25").replace("?", "%3f").replace("#", "%23")
