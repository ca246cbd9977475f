"""The only writer of run.sqlite: rows wait in memory until they are taken."""

from __future__ import annotations

import contextlib
import math
import sqlite3
import time
from collections.abc import Mapping
from typing import Any

from engine.errors import UserError
from engine.events import Event, Reading, State, to_json
from engine.schema import HOST, READINGS, SCHEMA, schema_version
from engine.store import RunDirectory
from engine.waiting import Row, WaitingRows

_PATIENCE_MILLISECONDS = 200  # training waits meanwhile, and rows can wait in memory
_LAST_PATIENCE_MILLISECONDS = 5000
_RETRY_SHARE = 0.05  # of the time, at most, for tries in vain: what waits grows, and so does a try

_STATEMENTS = {  # each may be carried out twice
    "attempt": "INSERT OR IGNORE INTO attempt (id, parent, from_step, total_steps, started, state) "
    "VALUES (?, ?, ?, ?, ?, ?)",
    "state": "UPDATE attempt SET state = ?, reason = ?, ended = ? WHERE id = ?",
    "metric": "INSERT OR IGNORE INTO metric (id, name) VALUES (?, ?)",
    "value": "INSERT OR REPLACE INTO value (attempt, step, metric, value, is_nan) VALUES (?, ?, ?, ?, ?)",
    "event": "INSERT OR IGNORE INTO event (id, attempt, time, kind, body) VALUES (?, ?, ?, ?, ?)",
    "reading": f"INSERT OR REPLACE INTO host (time, {', '.join(READINGS)}) VALUES (?{', ?' * len(READINGS)})",
}


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
            version = schema_version(self._database, run.database_path)
            if version == 0:
                self._database.executescript(f"BEGIN; {SCHEMA} COMMIT;")
            elif version == 1:
                self._database.executescript(f"BEGIN; {HOST} PRAGMA user_version = 2; COMMIT;")
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
        self._add("reading", reading.time, *(getattr(reading, name) for name in READINGS))

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
