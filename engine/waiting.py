"""Rows that run.sqlite does not take (a lock that stays, a damaged page), kept beside it until it does.

    runs/NAME/waiting.json      a list of rows, each the name of its statement in `engine.store` and its values

It is written before a checkpoint is, and at the end of a run, so that no checkpoint is newer than the rows before it.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

from engine.durable import write_json
from engine.errors import UserError

Row = tuple[str, tuple[Any, ...]]


class WaitingRows:
    """The file beside a run's store."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "waiting.json"
        self.kept = self._path.exists()
        """Whether there is one."""

    def keep(self, rows: Sequence[Row]) -> bool:
        """Replaces what is kept; false where that cannot be written either."""
        try:
            write_json(self._path, rows)
        except OSError:
            return False
        self.kept = True
        return True

    def take(self, names: Container[str]) -> list[Row]:
        """What is kept. Raises `UserError` where it cannot be read, or has others than these names."""
        if not self.kept:
            return []
        try:
            rows = [(name, tuple(values)) for name, values in json.loads(self._path.read_text(encoding="utf-8"))]
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{self._path} cannot be read: {error}; without it some steps are missing") from None
        if strange := [name for name, _ in rows if name not in names]:
            raise UserError(f"{self._path} has rows of an unknown kind: {strange[0]!r}")
        return rows

    def forget(self) -> None:
        """The store has them now; to write them twice would do no harm."""
        if self.kept:
            with contextlib.suppress(OSError):
                self._path.unlink(missing_ok=True)
            self.kept = False
