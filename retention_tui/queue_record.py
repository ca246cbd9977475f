"""What a queue has to do and how far it has come, in a file of the runs folder.

It is written whole at every change, so that a queue that was stopped or killed can be gone on with:

    runs/queue-20261121-231200.json    {"format": 1, …, "entries": [{"profile": "demo", "state": "pending", …}, …]}

An entry is pending, then running, and at last finished, stopped or failed; one that was under way when the queue itself
was stopped is interrupted, and resumed when the queue goes on.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from engine.config import load_config
from engine.durable import write_json
from engine.errors import UserError
from engine.profile_files import find_profile, load_profile
from engine.report import INTERRUPTED

FORMAT = 1
PENDING, RUNNING = "pending", "running"
"""The states of an entry besides `INTERRUPTED` and those in which a run ends."""


@dataclass
class Entry:
    """One profile of a queue and what became of it. Times are in seconds since the epoch."""

    profile: str
    overrides: list[str] = field(default_factory=list)
    run: str | None = None
    state: str = PENDING
    exit_code: int | None = None
    reason: str = ""
    started: float | None = None
    ended: float | None = None

    @property
    def left(self) -> bool:
        """True while there is still something to be done for it."""
        return self.state in (PENDING, RUNNING, INTERRUPTED)


@dataclass
class Record:
    """The file of a queue. `folder` is where it was given: names of files in overrides are relative to it.

    `anyway` also starts what this machine has not enough memory for.
    """

    path: Path
    folder: str
    entries: list[Entry]
    anyway: bool = False

    def save(self) -> None:
        """Raises `OSError` where it cannot be written; the file is then as it was."""
        entries = [asdict(entry) for entry in self.entries]
        head = {"format": FORMAT, "folder": self.folder, "anyway": self.anyway}
        write_json(self.path, {**head, "entries": entries})

    @classmethod
    def load(cls, path: Path) -> Record:
        """Raises `UserError` for a file that is damaged or from a newer release."""
        try:
            stored: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if stored["format"] > FORMAT:
                raise UserError(f"{path} has format {stored['format']}; this release reads up to {FORMAT}")
            entries = [Entry(**entry) for entry in stored["entries"]]
            return cls(path, stored["folder"], entries, bool(stored.get("anyway")))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} cannot be read as a queue's record: {error!r}") from None


def new_queue(
    runs_folder: Path, profiles: Sequence[str], overrides: Sequence[str] = (), anyway: bool = False
) -> Record:
    """The record of a new queue, not yet written. Raises `UserError` where one of the profiles is wrong, or, but
    `anyway`, where this machine has not enough memory for it."""
    entries = []
    for profile in profiles:
        resolved, path = load_profile(profile, overrides), find_profile(profile)
        try:
            if not anyway:
                from engine.planner import plan, refuse_what_cannot_fit  # loads MLX

                refuse_what_cannot_fit(plan(resolved))
        except UserError as error:
            raise UserError(f"{profile}: {error}") from None
        named = str(path.resolve()) if path == Path(profile) else profile
        entries.append(Entry(named, list(overrides)))
    load_config()
    stamp, number = time.strftime("queue-%Y%m%d-%H%M%S"), 1
    while (path := runs_folder / f"{stamp}{f'-{number}' if number > 1 else ''}.json").exists():
        number += 1
    return Record(path.absolute(), str(Path.cwd()), entries, anyway)


def unfinished_queue(runs_folder: Path) -> Record | None:
    """The newest queue of a folder of which something is left. Raises `UserError` where a file is damaged."""
    paths = sorted(runs_folder.glob("queue-*.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    records = (Record.load(path.absolute()) for path in paths)
    return next((record for record in records if any(entry.left for entry in record.entries)), None)
