"""Makes a process's own writes fail, or the process vanish, at chosen moments; the code under test stays as it is.

    fault_injection.py PLAN FOLDER ARGUMENT…      the command line, hurt so

A plan is `exit@12`: vanish, as by SIGKILL, at the 12th moment (two a call: before and after it; writing a checkpoint's
arrays has one in its midst), or `fsync:5@3-6`: the 3rd to 6th call of fsync fail with errno 5. Calls are fsync, rename,
replace, mkdir, rmdir, unlink, open (for writing), save (MLX's writing of arrays) and commit; those that name a path
count inside FOLDER only.
"""

from __future__ import annotations

import io
import os
import sqlite3
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.backend import mx


@dataclass(frozen=True)
class Plan:
    """What fails: `call` with `errno` from its `first` to its `last` time; or at moment `first` the process itself."""

    call: str
    errno: int
    first: int
    last: int

    @staticmethod
    def parse(text: str) -> Plan:
        what, _, when = text.partition("@")
        call, _, errno = what.partition(":")
        first, _, last = when.partition("-")
        return Plan(call, int(errno or 0), int(first), int(last or first))


class Faults:
    """The present process's writes, patched for good."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        self._plan, self._folder = plan, str(folder)
        self._calls: Counter[str] = Counter()
        self._moments = 0
        for name in ("mkdir", "rmdir", "unlink", "rename", "replace", "fsync"):
            setattr(os, name, self._hurt(name, getattr(os, name)))
        io.open = self._hurt("open", io.open)  # type: ignore[assignment]
        self._save = mx.save_safetensors
        mx.save_safetensors = self._save_arrays  # type: ignore[method-assign]
        self._connect = sqlite3.connect
        sqlite3.connect = self._open_database  # type: ignore[assignment]

    def _hurt(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if not self._concerned(name, arguments, options):
                return function(*arguments, **options)
            self._fail(name)
            self._moment()
            result = function(*arguments, **options)
            self._moment()
            return result

        return call

    def _concerned(self, name: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> bool:
        if name == "fsync" or options.get("dir_fd") is not None:
            return True
        if isinstance(arguments[0], int) or not os.fspath(arguments[0]).startswith(self._folder):
            return False
        return name != "open" or not {"w", "a", "x"}.isdisjoint(arguments[1] if len(arguments) > 1 else "r")

    def _save_arrays(self, path: str, *arguments: Any, **options: Any) -> None:
        self._moment()
        self._save(path, *arguments, **options)
        whole = Path(path).read_bytes()
        os.truncate(path, len(whole) // 2)
        self._fail("save")
        self._moment()
        Path(path).write_bytes(whole)
        self._moment()

    def _open_database(self, *arguments: Any, **options: Any) -> sqlite3.Connection:
        faults = self

        class Database(sqlite3.Connection):
            def execute(self, statement: str, *values: Any) -> sqlite3.Cursor:
                if not statement.startswith(("COMMIT", "PRAGMA wal_checkpoint")):
                    return super().execute(statement, *values)
                if statement == "COMMIT":
                    faults._fail("commit")
                faults._moment()
                cursor = super().execute(statement, *values)
                faults._moment()
                return cursor

        return self._connect(*arguments, **options, factory=Database)

    def _fail(self, name: str) -> None:
        self._calls[name] += 1
        if name != self._plan.call or not self._plan.first <= self._calls[name] <= self._plan.last:
            return
        words = os.strerror(self._plan.errno)
        if name == "save":
            raise RuntimeError(f"[save_safetensors] {words}")
        if name == "commit":
            raise sqlite3.OperationalError(words)
        raise OSError(self._plan.errno, words)

    def _moment(self) -> None:
        self._moments += 1
        if self._plan.call == "exit" and self._moments == self._plan.first:
            os._exit(137)


if __name__ == "__main__":
    plan, folder, *arguments = sys.argv[1:]
    sys.argv = ["retention-tui", *arguments]
    from retention_tui.cli import main

    Faults(Plan.parse(plan), Path(folder))
    main()
