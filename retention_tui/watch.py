"""Runs that other processes train, from the command line: watch one, steer it, start one, show it to a browser."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from engine.commands import Checkpoint, Command, Pause, Resume, Set, Stop, Validate
from engine.errors import ExitCode, UserError
from engine.events import Alarm, CheckpointSaved, Event, Notice, RunEnded, State, StateChanged, Validated
from engine.lines import describe
from engine.runs import find_run
from retention_tui import attend, headless
from retention_tui.background import Background, GivenUp, StartFailed
from retention_tui.client import ConnectionLost
from retention_tui.remote import RemoteClient, not_live
from retention_tui.session import Session

ACTIONS: dict[str, Command] = {
    "pause": Pause(),
    "resume": Resume(),
    "checkpoint": Checkpoint(),
    "validate": Validate(),
    "stop": Stop(),
}
_PATIENCE_SECONDS = 15.0


def watch(session: Session, run_name: str, *, no_screen: bool, as_json: bool, looks_only: bool = False) -> int:
    """Shows a live run until it has ended or the screen is left; without a terminal, its lines.

    The exit code is the run's own once it has ended, 0 where it was left, 2 where it was interrupted.
    """
    client = RemoteClient(find_run(session.runs_folder, run_name), looks_only=looks_only)
    if not (no_screen or as_json) and attend.has_terminal():
        return _say_end(client, attend.show(session, client))
    headless.follow(client, as_json=as_json)
    return _say_end(client, ExitCode.OK, told=True)


def start(session: Session, begin: Callable[[], Background], *, no_screen: bool, as_json: bool) -> int:
    """Starts a run in the background and shows it; without a terminal, says where it is."""
    shown = not (no_screen or as_json) and attend.has_terminal()
    if shown:
        print("starting in the background…", flush=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a start that is given up ends its process
    try:
        background = begin()
    except GivenUp as given_up:
        left = not_live(given_up.run) if given_up.run is not None else "nothing was started"
        print(f"retention-tui: given up; {left}", file=sys.stderr)
        return 128 + signal.SIGINT
    except KeyboardInterrupt:
        print("retention-tui: given up; what was begun stops by itself", file=sys.stderr)
        return 128 + signal.SIGINT
    except StartFailed as failure:
        print(f"retention-tui: {failure}", file=sys.stderr)
        return failure.exit_code
    if shown:
        try:
            client = RemoteClient(background.run)
        except UserError as short:  # it has ended already
            print(short)
            return ExitCode.OK
        return _say_end(client, attend.show(session, client))
    about = {"run": background.run.name, "directory": str(background.run.path), "pid": background.pid}
    print(json.dumps(about, ensure_ascii=False) if as_json else attend.in_background(background))
    return ExitCode.OK


def control(runs_folder: Path, run_name: str, action: str, setting: str | None) -> int:
    """Sends one command to a live run and says in one line what came of it."""
    command = _command(action, setting)
    client = RemoteClient(find_run(runs_folder, run_name))
    client.arrived.wait(_PATIENCE_SECONDS)
    state = [event.state for event in client.events() if isinstance(event, StateChanged)]
    if state and (action == "pause") == (state[-1] is State.PAUSED) and action in ("pause", "resume"):
        print(f"{client.run.name} is {state[-1]} already")
        return ExitCode.OK
    client.send(command)
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while (left := deadline - time.monotonic()) > 0:
        for event in client.events(left):
            if (answer := _answer(command, event)) is not None:
                words, done = answer
                if done:
                    print(f"{client.run.name}: {words}")
                    return ExitCode.OK
                raise UserError(f"{client.run.name}: {words}")
    print(f"{client.run.name}: asked to {action}; it has not come to it yet, as it does so between two micro-batches")
    return ExitCode.OK


def _command(action: str, setting: str | None) -> Command:
    if action == "set":
        key, equals, value = (setting or "").partition("=")
        if not (key and equals):
            raise UserError("control RUN set needs KEY=VALUE, e.g. train.learning_rate=1e-4")
        return Set(key, value)
    if action not in ACTIONS:
        raise UserError(f"control cannot {action!r}; it can {', '.join(ACTIONS)} and set KEY=VALUE")
    if setting is not None:
        raise UserError(f"control RUN {action} takes nothing more: {setting!r} is too much")
    return ACTIONS[action]


def _answer(command: Command, event: Event) -> tuple[str, bool] | None:
    """What an event says to a command, in words, and whether it was done; None where it says nothing to it."""
    match command, event:
        case Stop(), RunEnded(exit_code=0):
            return f"{describe(event)}", True
        case _, RunEnded():
            return f"{describe(event)}", False
        case _, ConnectionLost():
            return event.text, False
        case _, Alarm() if event.text.startswith(("refused: ", "not sent: ")):
            return event.text, False
        case Pause(), StateChanged(state=State.PAUSED):
            return "paused", True
        case Resume(), StateChanged(state=State.TRAINING | State.VALIDATING):
            return "goes on", True
        case (Checkpoint(), CheckpointSaved()) | (Validate(), Validated()):
            return f"{describe(event)}", True
        case Checkpoint() | Validate(), Notice() if event.text.endswith(" already"):
            return event.text, True
        case Checkpoint(), Alarm(level="critical", guard=""):
            return event.text, False
        case Set(), Notice() if event.text.startswith(f"{command.key} = "):
            return event.text, True
        case Set(), Notice() if event.text.startswith("not changed: "):
            return event.text, False
    return None


def _say_end(client: RemoteClient, code: int, told: bool = False) -> int:
    """Says how a watched run ended, or that it goes on; the exit code."""
    name = client.run.name
    if code:  # by a signal, or the screen failed
        return code
    if client.lost is not None:
        print(f"retention-tui: {client.lost.text}", file=sys.stderr)
        return ExitCode.BAD_INPUT
    if client.ended is None:
        print(attend.in_background(client))
        return ExitCode.OK
    if client.ended.exit_code != ExitCode.OK:
        print(f"retention-tui: {name}: {describe(client.ended)}", file=sys.stderr)
    elif not told:
        print(f"{name}: {describe(client.ended)}")
    return client.ended.exit_code
