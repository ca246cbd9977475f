"""A plan for a screen, made in a process of its own: the app itself loads MLX only when a run is started in it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.errors import UserError
from retention_tui.fresh import fresh_process

_SAYS = "retention-tui: "
_PATIENCE_SECONDS = 0.1


def ask_for_plan(
    target: Path, runs_folder: Path, *, measured: bool = False, given_up: Callable[[], bool] = lambda: False
) -> dict[str, Any] | None:
    """The table of `retention-tui plan --json` for a profile's file or a run's folder; takes a second or two.

    With `measured`, real steps are taken first, which takes longer. None once it was `given_up`. Raises `UserError` in
    one line.
    """
    options = ["--json", "--runs-dir", str(runs_folder.resolve()), *(["--measure"] if measured else [])]
    command = fresh_process(["plan", str(target.resolve()), *options])
    pipe = subprocess.PIPE
    try:
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True) as process:
            while True:
                try:
                    answer, errors = process.communicate(timeout=_PATIENCE_SECONDS)
                    break
                except subprocess.TimeoutExpired:
                    if given_up():
                        process.kill()
                        return None
        table: dict[str, Any] = json.loads(answer) if process.returncode == 0 else {}
    except (OSError, ValueError) as error:
        raise UserError(f"{target.name} cannot be planned: {error}") from None
    if not table:
        said = (errors.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
        raise UserError(said.removeprefix(_SAYS))
    return table
