"""How a command stays with its run: with a screen or without, until it has ended; signals and the exit code."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable

from engine.commands import Resume
from engine.cores import ranks_launched
from engine.errors import ExitCode
from engine.lines import describe
from retention_tui import headless
from retention_tui.background import Background
from retention_tui.client import Client
from retention_tui.remote import RemoteClient
from retention_tui.session import Session
from retention_tui.visits import remember_look

_RANK_PATIENCE_SECONDS = 10


def attend(session: Session, no_screen: bool, as_json: bool) -> int:
    """Stays with a started run until it has ended, with a screen where there is a terminal."""
    if not (no_screen or as_json) and has_terminal() and not session.interrupted:
        return show(session)
    assert session.client is not None
    headless.follow(session.client, as_json=as_json)
    return finish(session)


def show(session: Session, watched: RemoteClient | None = None) -> int:
    """Shows the app: with a run that is `watched`, with the session's own, or with the launcher.

    It may be left, fail, or lose its terminal before the run has ended: the run goes on.
    """
    from retention_tui.app import RetentionApp
    from retention_tui.terminal import Terminal

    choice: str | None = None
    with Terminal() as terminal:
        _stop_on_signals(session, terminal.leave)
        if session.interrupted:
            terminal.leave()
        signal.signal(signal.SIGHUP, lambda *_: terminal.hang_up())
        session.on_launch = lambda run: terminal.log_to(run.log_path)
        if session.client is not None:
            terminal.log_to(session.client.run.log_path)
        try:
            app = RetentionApp(session, watched or session.client, terminal.driver_class)
            choice = app.run()
            failed = bool(app.return_code)
            if choice is None and not failed:  # somebody was here and left; what comes now is news to them
                _remember(session, watched or session.client, app.told_until)
        except Exception:
            traceback.print_exc()
            failed = True
    if session.client is None:
        if failed:
            sys.stderr.write(terminal.printed())
        if watched is None and session.background is not None and session.background.run.is_live():
            print(in_background(session.background))
        return finish(session) or (ExitCode.DEFECT if failed else ExitCode.OK)
    if (choice == "detach" or failed) and not session.interrupted:
        session.client.send(Resume(overrule=False))  # a paused run would wait for ever: nobody is left to go on with it
    if terminal.lost:  # nobody reads here; the run's log has it all
        return finish(session)
    run = session.client.run
    if failed and not terminal.leaving:
        print(f"retention-tui: the screen failed (see {run.log_path}); the run goes on without it", file=sys.stderr)
    if choice == "detach" and session.running and not session.interrupted:
        print(f"{run.name} goes on here without its screen; Ctrl+C stops it with a checkpoint", flush=True)
    told = headless.follow(session.client)
    code = finish(session)
    if not told and session.ended is not None and session.ended.exit_code == ExitCode.OK:
        print(f"{run.name}: {describe(session.ended)}")
    return code


def _remember(session: Session, shown: Client | None, told_until: float | None) -> None:
    """What the launcher has told, and all of a run that was shown, is no news any more."""
    if told_until is not None:
        remember_look(session.runs_folder, moment=told_until)
    if shown is not None:
        remember_look(session.runs_folder, shown.run.name)


def in_background(background: Background | RemoteClient) -> str:
    """One line: what can be done about a run of another process."""
    name = background.run.name
    goes_on = "trains in the background" if isinstance(background, Background) else "goes on"
    return (
        f"{name} {goes_on}, process {background.pid}: "
        f"retention-tui watch {name} shows it, retention-tui control {name} stop ends it"
    )


def finish(session: Session) -> int:
    """Waits for the run; what failed is told in one line."""
    code = session.finish()
    if session.ended is not None and session.ended.exit_code != ExitCode.OK:
        print(f"retention-tui: {session.ended.reason}", file=sys.stderr)
    if session.move_failure:
        print(f"retention-tui: not in the background: {session.move_failure}", file=sys.stderr)
        return code or ExitCode.BAD_INPUT
    return code


def launch(session: Session, start: Callable[[], object]) -> None:
    """Starts a run that a signal stops. While ranks look for each other no handler runs, and any signal ends it."""
    if ranks_launched() == 1:
        _stop_on_signals(session)
        start()
    else:
        start()
        session.join_ranks()
        _stop_on_signals(session)


def assist(session: Session, start: Callable[[], object]) -> int:
    """A rank that only computes. Ctrl+C reaches rank 0 too, which decides; SIGTERM stops the run on all ranks."""

    def stop(number: int, _: object) -> None:
        session.stop("", number)
        _leave_if_stuck(session, number)

    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    start()
    session.join_ranks()
    signal.signal(signal.SIGTERM, stop)
    code = session.finish()
    if session.ended is not None and session.ended.exit_code != ExitCode.OK:
        print(f"retention-tui: rank {os.environ['MLX_RANK']}: {session.ended.reason}", file=sys.stderr)
    return code


def _leave_if_stuck(session: Session, number: int) -> None:
    """From now on, ends the process where another rank keeps it waiting, as one that hangs would for ever."""
    asked = time.monotonic()

    def watch() -> None:
        while session.running:
            time.sleep(0.2)
            if min(session.waiting_seconds, time.monotonic() - asked) > _RANK_PATIENCE_SECONDS:
                words = "another rank does not answer; the run goes on from its last checkpoint when it is resumed"
                os.write(2, f"retention-tui: {words}\n".encode())
                os._exit(128 + number)

    threading.Thread(target=watch, daemon=True).start()


def _stop_on_signals(session: Session, leave: Callable[[], None] | None = None) -> None:
    """SIGINT and SIGTERM stop the run with a checkpoint and `leave` the screen; a lost terminal never ends a run."""

    def stop(number: int, _: object) -> None:
        session.stop(f"stopped by {signal.Signals(number).name}", number)
        if ranks_launched() > 1:
            _leave_if_stuck(session, number)
        if leave is not None:
            leave()
        elif session.client is None and not session.starting:  # nothing to be saved yet
            raise SystemExit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def has_terminal() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


def is_helper_rank() -> bool:
    return int(os.environ.get("MLX_RANK", "0")) > 0
