"""The tables of run.sqlite. `PRAGMA user_version` is their version.

A run that is resumed goes on in a new *attempt*. The view `curve` is the current line: the newest attempt, before it
its parent up to the step where it began, and so on; rows that were left behind stay in the file.
"""

from __future__ import annotations

import dataclasses
import sqlite3
from pathlib import Path

from engine.errors import UserError
from engine.events import Reading

SCHEMA_VERSION = 2
READINGS = tuple(field.name for field in dataclasses.fields(Reading) if field.name != "time")
HOST = f"CREATE TABLE host (time REAL PRIMARY KEY, {', '.join(READINGS)}) WITHOUT ROWID;"
SCHEMA = f"""
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
{HOST}
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


def schema_version(database: sqlite3.Connection, path: Path) -> int:
    """0 for an empty file. Raises `UserError` for one from a newer release."""
    version: int = database.execute("PRAGMA user_version").fetchone()[0]
    if version > SCHEMA_VERSION:
        raise UserError(f"{path} has schema {version}; this release reads up to {SCHEMA_VERSION}")
    return version
