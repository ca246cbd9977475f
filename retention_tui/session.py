"""What the main thread owns: the engine, the run's lock, and the exit code. Screens come and go; this stays."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from engine.commands import Command, Pause, Stop
from engine.config import Hooks, load_config
from engine.control import ControlServer
from engine.errors import ExitCode, UserError
from engine.events import Event, RunEnded, State
from engine.hooks import HookRunner
from engine.host.mlx_variables import set_mlx_variables
from engine.profile import Profile
from engine.profile_files import find_profile, load_profile, validate_profile
from engine.runs import RunLock, create_run, find_run, remove_run
from engine.store import RunDirectory
from engine.worker import Engine
from retention_tui import background
from retention_tui.background import Background
from retention_tui.client import Client
from retention_tui.remote import watch_or_recall

_LAST_BREATH_SECONDS = 1.0
"""A run that has said its end has still to leave its thread."""


class LocalClient:
    """A run in this process, as a screen sees it. See `retention_tui.client.Client`."""

    here = True
    looks_only = False

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
        return self._mailbox.take(timeout_seconds)

    def close(self) -> None:
        """Nothing is to be done: the session sees the run to its end."""


class Session:
    """One process's runs, one after the other."""

    def __init__(self, runs_folder: Path) -> None:
        self.runs_folder = runs_folder
        self.client: LocalClient | None = None
        self.ended: RunEnded | None = None
        """How the last run ended, once it was waited for."""
        self.background: Background | None = None
        """The last run that was started in the background."""
        self.move_failure = ""
        """Why the last run could not be moved to the background, if so: it has been stopped."""
        self.on_launch: Callable[[RunDirectory], None] = lambda run: None
        """Called with each run just before it starts, on whatever thread starts it."""
        self._engine: Engine | None = None
        self._lock: RunLock | None = None
        self._server: ControlServer | None = None
        self._signal: int | None = None
        self._new = False
        self._hooks = Hooks()
        self._hook_runner: HookRunner | None = None
        self._starting, self._owning = threading.Lock(), threading.Lock()

    def start(
        self, profile: str, overrides: Sequence[str] = (), name: str | None = None, anyway: bool = False
    ) -> LocalClient:
        """Starts a new run of a profile, `anyway` also where it cannot fit. Raises `UserError` in one line."""
        resolved = load_profile(profile, overrides)
        set_mlx_variables(resolved.host)  # before anything loads MLX; the run says what of it could not be
        resolved, warning = _foresee(resolved, anyway)
        with self._starting_alone():
            run = create_run(self.runs_folder, find_profile(profile).stem, _identity(resolved), name)
            return self._launch(run, resolved, None, warning)

    def resume(self, run: str, which: str = "latest") -> LocalClient:
        """Goes on with a run from its latest checkpoint or another step. Raises `UserError` in one line."""
        found = find_run(self.runs_folder, run)
        resolved = validate_profile(found.identity()["profile"], where=str(found.identity_path))
        set_mlx_variables(resolved.host)
        if which != "latest":
            from engine.checkpoint import choose_checkpoint  # loads MLX

            choose_checkpoint(found, which)  # a wrong one is refused before the run is touched
        warning = _warned(found)
        with self._starting_alone():
            return self._launch(found, resolved, which, warning)

    def start_in_background(
        self, profile: str, overrides: Sequence[str] = (), name: str | None = None, anyway: bool = False
    ) -> Background:
        """As `start`, in a process of its own. Raises `UserError` in one line."""
        load_profile(profile, overrides)  # what is wrong with it is said at once
        settings = [word for override in overrides for word in ("--set", override)]
        options = [*settings, *(["--name", name] if name else []), *(["--anyway"] if anyway else [])]
        return self._start_in_background(["run", profile, *options])

    def resume_in_background(self, run: str, which: str = "latest") -> Background:
        """Goes on with a run in a process of its own. Raises `UserError` in one line."""
        found = find_run(self.runs_folder, run)
        return self._start_in_background(["resume", str(found.path), "--from", which])

    def move_to_background(self, paused: bool = False) -> Client | None:
        """Stops the present run with a checkpoint, goes on from it in a process of its own, and watches that.

        It is paused there too, if it was. None where the run ended otherwise meanwhile, or shall end. Waits for all
        that. Raises `UserError` where the process does not start.
        """
        client, hooks, moved = self.client, self._hook_runner, False
        if hooks is not None:
            hooks.hold_end()
        try:
            self.stop("moved to the background")
            self.finish()
            if client is None or self.ended is None or self.ended.state is not State.STOPPED or self.interrupted:
                return None
            remote = watch_or_recall(self.resume_in_background(str(client.run.path)).run)
            moved = True
        except UserError as error:
            self.move_failure = str(error)
            raise
        finally:
            if hooks is not None:
                hooks.settle_end(told=not moved)
        self.client = self.ended = None
        if paused:
            remote.send(Pause())
        return remote

    def _start_in_background(self, arguments: Sequence[str]) -> Background:
        self.background = background.start(arguments, self.runs_folder)
        return self.background

    def assist(self, profile: str, overrides: Sequence[str] = (), name: str | None = None) -> None:
        """Trains as a rank that only computes: no run directory, no lock, nothing said."""
        resolved = load_profile(profile, overrides)
        set_mlx_variables(resolved.host)
        from engine.planner import settle  # loads MLX

        self._assist(self.runs_folder / (name or "run"), settle(resolved))

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
    def starting(self) -> bool:
        """True while a run is being made: what is begun then is ended in order."""
        return self._starting.locked()

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

    @contextlib.contextmanager
    def _starting_alone(self) -> Iterator[None]:
        """For one thread at a time, and only where no run is being trained: what ran before has been settled."""
        if not self._starting.acquire(blocking=False):
            raise UserError("a run is being started already")
        try:
            engine = self._engine
            if engine is not None and engine.join(_LAST_BREATH_SECONDS) is None:
                raise UserError(f"run {engine.run.name} is being trained here already; stop that one first")
            self._settle()
            self._hooks = load_config().hooks
            yield
        finally:
            self._starting.release()

    def _launch(self, run: RunDirectory, profile: Profile, resume_from: str | None, warning: str = "") -> LocalClient:
        with self._owning:
            self._lock = RunLock(run)
            self._new, self.move_failure = resume_from is None, ""
            engine = Engine(run, profile, resume_from, warning=warning)
            client = LocalClient(engine)
            hooks = HookRunner(self._hooks, run, engine.subscribe()) if self._hooks.commands() else None
            self._server = ControlServer(run, engine.subscribe(), engine.send)
            try:
                self.on_launch(run)
                self._server.start()
                engine.start()
            except BaseException as error:
                self._give_back(run, in_vain=True)
                if isinstance(error, OSError):
                    raise UserError(f"run {run.name} cannot be started: {error.strerror or error}") from error
                raise
            self._engine, self.client, self._hook_runner = engine, client, hooks
            if hooks is not None:
                hooks.start()
        if self._signal:  # it came while this run was being prepared
            engine.send(Stop(reason=f"stopped by {signal.Signals(self._signal).name}"))
        return client

    def _assist(self, path: Path, profile: Profile) -> None:
        self._engine = Engine(RunDirectory(path), profile, assists=True)
        self._engine.start()

    def _settle(self) -> int:
        """Joins what ran before and gives its lock back."""
        with self._owning:
            engine = self._engine
        if engine is None:
            return ExitCode.OK
        ended = engine.join()
        assert ended is not None
        with self._owning:
            if self._engine is engine:  # else another thread was faster
                self.ended, self._engine = ended, None
                self._give_back(engine.run, in_vain=ended.exit_code == ExitCode.BAD_INPUT)
        return ended.exit_code

    def _give_back(self, run: RunDirectory, in_vain: bool) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        if self._lock is None:
            return
        if self._new and in_vain and not _has_begun(run):
            remove_run(run)  # the next try may have its name
        self._lock.release()
        self._lock = None


def _has_begun(run: RunDirectory) -> bool:
    """Whether there may be something of a run that is worth keeping."""
    try:
        return run.checkpoints_path.exists() or bool(run.attempts())
    except UserError:
        return True


def _identity(profile: Profile) -> dict[str, object]:
    from engine.environment import environment  # loads MLX

    return {"profile": profile.model_dump(mode="json", by_alias=True), "environment": environment()}


def _warned(run: RunDirectory) -> str:
    """What the plan of a run that goes on warns of; it was begun, so nothing is refused."""
    from engine.planner import profile_of  # loads MLX

    with contextlib.suppress(UserError):  # what is damaged, its opening tells better
        return _foresee(profile_of(run), anyway=True)[1]
    return ""


def _foresee(profile: Profile, anyway: bool) -> tuple[Profile, str]:
    """A run's profile with nothing left to choose, and what its plan warns of.

    Raises `UserError` where this machine has not enough memory, except `anyway`.
    """
    from engine.planner import plan, refuse_what_cannot_fit  # loads MLX

    made = plan(profile)
    if not anyway:
        refuse_what_cannot_fit(made)
    return made.profile, made.warning
