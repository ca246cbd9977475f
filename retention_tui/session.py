"""What the main thread owns: the engine, the run's lock, and the exit code. Screens come and go; this stays."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

from engine.commands import Command, Stop
from engine.errors import ExitCode
from engine.events import Event, RunEnded
from engine.profile import Profile, find_profile, load_profile, validate_profile
from engine.store import RunDirectory, RunLock, create_run, find_run
from engine.worker import Engine


class LocalClient:
    """A run in this process, as a screen sees it. See `retention_tui.client.Client`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._mailbox = engine.subscribe()

    @property
    def run(self) -> RunDirectory:
        return self._engine.run

    @property
    def alive(self) -> bool:
        return self._engine.ended is None

    def send(self, command: Command) -> None:
        self._engine.send(command)

    def events(self, timeout_seconds: float = 0.0) -> list[Event]:
        """All events since the last call; waits at most `timeout_seconds` for a first one."""
        return self._mailbox.take(timeout_seconds)


class Session:
    """One process's runs, one after the other."""

    def __init__(self, runs_folder: Path) -> None:
        self.runs_folder = runs_folder
        self.client: LocalClient | None = None
        self.ended: RunEnded | None = None
        """How the last run ended, once it was waited for."""
        self.on_launch: Callable[[RunDirectory], None] = lambda run: None
        """Called with each run just before it starts, on whatever thread starts it."""
        self._engine: Engine | None = None
        self._lock: RunLock | None = None
        self._signal: int | None = None
        self._new = False

    def start(self, profile: str, overrides: Sequence[str] = (), name: str | None = None) -> LocalClient:
        """Starts a new run of a profile. Raises `UserError` in one line."""
        resolved = load_profile(profile, overrides)
        self._settle()
        run = create_run(self.runs_folder, find_profile(profile).stem, _identity(resolved), name)
        return self._launch(run, resolved, None)

    def resume(self, run: str, which: str = "latest") -> LocalClient:
        """Goes on with a run from its latest checkpoint or another step. Raises `UserError` in one line."""
        found = find_run(self.runs_folder, run)
        resolved = validate_profile(found.identity()["profile"], where=str(found.identity_path))
        self._settle()
        return self._launch(found, resolved, which)

    def assist(self, profile: str, overrides: Sequence[str] = (), name: str | None = None) -> None:
        """Trains as a rank that only computes: no run directory, no lock, nothing said."""
        self._assist(self.runs_folder / (name or "run"), load_profile(profile, overrides))

    def assist_resume(self, run: str) -> None:
        """As `assist`, for a run that is resumed: what it goes on from comes from rank 0."""
        found = find_run(self.runs_folder, run)
        self._assist(found.path, validate_profile(found.identity()["profile"], where=str(found.identity_path)))

    def join_ranks(self) -> None:
        """Waits until the present run's ranks have found each other."""
        if self._engine is not None:
            self._engine.joined.wait()

    @property
    def waiting_seconds(self) -> float:
        """For how long the present run has been waiting for another rank."""
        return self._engine.waiting_seconds if self._engine is not None else 0.0

    def stop(self, reason: str, signal_number: int | None = None) -> None:
        """Asks the present run to checkpoint and end at the next micro-batch; never waits."""
        self._signal = self._signal or signal_number
        if self._engine is not None:
            self._engine.send(Stop(reason=reason))

    @property
    def running(self) -> bool:
        return self._engine is not None and self._engine.ended is None

    @property
    def interrupted(self) -> bool:
        """True once a signal has asked for the end."""
        return self._signal is not None

    def finish(self) -> int:
        """Waits for the present run, if any; the process's exit code."""
        code = self._settle()
        return 128 + self._signal if self._signal and code == ExitCode.OK else code

    def _launch(self, run: RunDirectory, profile: Profile, resume_from: str | None) -> LocalClient:
        self._lock = RunLock(run)
        self._new = resume_from is None
        self._engine = Engine(run, profile, resume_from)
        self.client = LocalClient(self._engine)
        self.on_launch(run)
        self._engine.start()
        if self._signal:  # it came while this run was being prepared
            self._engine.send(Stop(reason=f"stopped by {signal.Signals(self._signal).name}"))
        return self.client

    def _assist(self, path: Path, profile: Profile) -> None:
        self._engine = Engine(RunDirectory(path), profile, assists=True)
        self._engine.start()

    def _settle(self) -> int:
        """Joins what ran before and gives its lock back."""
        if self._engine is None:
            return ExitCode.OK
        ended = self.ended = self._engine.join()
        assert ended is not None
        run = self._engine.run
        self._engine = None
        if self._lock is not None:
            if self._new and ended.exit_code == ExitCode.BAD_INPUT and not run.attempts():
                shutil.rmtree(run.path)  # it never began: the next try may have its name
            self._lock.release()
            self._lock = None
        return ended.exit_code


def _identity(profile: Profile) -> dict[str, object]:
    from engine.environment import environment  # loads MLX

    return {"profile": profile.model_dump(mode="json", by_alias=True), "environment": environment()}
