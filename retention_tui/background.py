"""A run in a process of its own, that outlives its terminal and whoever started it."""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from engine.cores import ranks_launched
from engine.errors import ExitCode, UserError
from engine.runs import RunLock, remove_run
from engine.store import RunDirectory
from retention_tui.fresh import fresh_process

_SAYS = "retention-tui: "


@dataclass(frozen=True)
class Background:
    """A run that was started in the background, and its process."""

    run: RunDirectory
    pid: int


class StartFailed(UserError):
    """The process ended before its run had opened: its one line, and its exit code."""

    def __init__(self, line: str, exit_code: int) -> None:
        super().__init__(line)
        self.exit_code = exit_code


class GivenUp(Exception):
    """Ctrl+C came before the run had opened; its process has ended. `run` is what there is of it, if anything."""

    def __init__(self, run: RunDirectory | None) -> None:
        super().__init__("given up")
        self.run = run


def start(arguments: Sequence[str], runs_folder: Path) -> Background:
    """Starts `run …` or `resume …` in a new session and waits until the run has opened.

    Raises `StartFailed` or `GivenUp`.

    What it prints comes through a pipe until the run has opened; then the pipe is closed, and its own words and its
    libraries' go to the run's log (`retention_tui.headless.Printer`).
    """
    if ranks_launched() > 1:
        raise UserError("--background is for one process: start several ranks with mlx.launch … --headless")
    try:
        process = subprocess.Popen(
            fresh_process([*arguments, "--headless", "--json", "--runs-dir", str(runs_folder.resolve())]),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    except OSError as error:
        raise UserError(f"no process could be started: {error.strerror or error}") from None
    assert process.stdout is not None
    try:
        run, said = _wait_for_run(process.stdout)
        process.stdout.close()
    except KeyboardInterrupt:
        raise GivenUp(_give_up(process, new=arguments[0] == "run")) from None
    except BaseException:  # nobody would know of it
        process.terminate()
        raise
    if run is None:
        code = process.wait()
        raise StartFailed(said or f"the background process ended with code {code}", code or ExitCode.DEFECT)
    threading.Thread(target=process.wait, name=f"reaper of {run.name}", daemon=True).start()
    return Background(run, process.pid)


def _give_up(process: subprocess.Popen[bytes], new: bool) -> RunDirectory | None:
    """Ends a start that nobody waits for any more: the run that is left, stopped with a checkpoint, if any."""
    assert process.stdout is not None
    process.terminate()
    run, _ = _wait_for_run(process.stdout)
    process.stdout.close()
    process.wait()
    if run is not None and new and run.summary().step == 0:  # its name is free again
        lock = RunLock(run)
        remove_run(run)
        lock.release()
        return None
    return run


def _wait_for_run(output: IO[bytes]) -> tuple[RunDirectory | None, str]:
    """The run once it has opened; or none, and the last line that the process said for people."""
    said = ""
    for line in output:
        text = line.decode(errors="replace").rstrip()
        if text.startswith(_SAYS):
            said = text.removeprefix(_SAYS)
        with suppress(ValueError):
            event = json.loads(text)
            if isinstance(event, dict) and event.get("event") == "run_opened":
                return RunDirectory(Path(event["directory"])), said
    return None, said
