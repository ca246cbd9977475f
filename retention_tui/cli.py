"""The command line. Everything that the screen can do, it can do too: both send commands and read events."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer

from engine.commands import Generate, Resume
from engine.cores import ranks_launched
from engine.errors import ExitCode, UserError
from engine.lines import describe
from retention_tui import headless, listings, wording
from retention_tui.session import Session

cli = typer.Typer(
    add_completion=False,
    no_args_is_help=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="The terminal cockpit for training models on your own machine. Without a command: the app.",
)

RunsDir = Annotated[
    Path, typer.Option("--runs-dir", envvar="RETENTION_TUI_RUNS", help="where runs are kept", show_default=True)
]
Headless = Annotated[bool, typer.Option("--headless", help="lines instead of the screen; so without a terminal anyway")]
Json = Annotated[bool, typer.Option("--json", help="one JSON object a line")]
RunName = Annotated[str, typer.Argument(metavar="RUN", help="a run's name, or its folder")]
RUNS = Path("runs")
SET = "override a key of the profile, e.g. train.steps=50; may be given several times"
_RANK_PATIENCE_SECONDS = 10


def _print_version(asked: bool) -> None:
    if asked:
        print(f"retention-tui {metadata.version('retention-tui')}")
        raise typer.Exit


@cli.callback(invoke_without_command=True)
def app(
    context: typer.Context,
    runs_dir: RunsDir = RUNS,
    _: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print it")] = False,
) -> None:
    """The app: pick a profile or a run."""
    os.environ["RETENTION_TUI_RUNS"] = str(runs_dir)  # it may stand before the command as well as after it
    if context.invoked_subcommand is None:
        if not _has_terminal():
            raise UserError("no terminal here for the app; try: retention-tui run PROFILE --headless, or --help")
        raise SystemExit(_show(Session(runs_dir)))


@cli.command()
def run(
    profile: Annotated[str, typer.Argument(metavar="PROFILE", help="a profile's name, or its file")],
    overrides: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help=SET)] = None,
    name: Annotated[str | None, typer.Option(help="the run's name; PROFILE, PROFILE-2 … if absent")] = None,
    runs_dir: RunsDir = RUNS,
    no_screen: Headless = False,
    as_json: Json = False,
) -> None:
    """Train a profile."""
    session = Session(runs_dir)
    if _is_helper_rank():
        raise SystemExit(_assist(session, lambda: session.assist(profile, overrides or (), name)))
    _launch(session, lambda: session.start(profile, overrides or (), name))
    raise SystemExit(_attend(session, no_screen, as_json))


@cli.command()
def resume(
    run_name: RunName,
    step: Annotated[str, typer.Option("--from", metavar="STEP", help="latest, best or a checkpoint's step")] = "latest",
    runs_dir: RunsDir = RUNS,
    no_screen: Headless = False,
    as_json: Json = False,
) -> None:
    """Go on with a run, exactly, from a checkpoint."""
    session = Session(runs_dir)
    if _is_helper_rank():
        raise SystemExit(_assist(session, lambda: session.assist_resume(run_name)))
    _launch(session, lambda: session.resume(run_name, step))
    raise SystemExit(_attend(session, no_screen, as_json))


@cli.command()
def generate(
    run_name: RunName,
    prompt: Annotated[str, typer.Option("--prompt", "-p", metavar="TEXT", help="the text to go on from")],
    checkpoint: Annotated[str, typer.Option(help="latest, best or a checkpoint's step")] = "latest",
    max_tokens: Annotated[int, typer.Option(min=1)] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 always takes the likeliest token")] = 0.7,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 0.9,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    runs_dir: RunsDir = RUNS,
) -> None:
    """Continue a text with a run's model."""
    from engine.speaker import continue_text  # loads MLX

    ask = Generate("command line", prompt, max_tokens, temperature, top_p, seed)

    def report(text: str) -> None:
        print(f"retention-tui: {text}", file=sys.stderr)

    for piece in continue_text(runs_dir, run_name, checkpoint, ask, report):
        sys.stdout.write(wording.printable(piece) if sys.stdout.isatty() else piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


@cli.command()
def runs(runs_dir: RunsDir = RUNS, as_json: Json = False) -> None:
    """List the runs."""
    listings.print_runs(runs_dir, as_json)


@cli.command()
def show(run_name: RunName, runs_dir: RunsDir = RUNS, as_json: Json = False) -> None:
    """Tell about one run: where it stands, its checkpoints and alarms."""
    listings.print_run(runs_dir, run_name, as_json)


@cli.command()
def export(
    run_name: RunName,
    form: Annotated[str, typer.Option("--format", help="csv or jsonl")] = "csv",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="a file; standard output if absent")] = None,
    runs_dir: RunsDir = RUNS,
) -> None:
    """Write every step's metrics, in full precision."""
    listings.export_run(runs_dir, run_name, form, output)


@cli.command()
def profiles(as_json: Json = False) -> None:
    """List the profiles."""
    listings.print_profiles(as_json)


@cli.command()
def doctor(runs_dir: RunsDir = RUNS, as_json: Json = False) -> None:
    """Look this machine over: BLAS, speed, memory, versions."""
    listings.print_findings(runs_dir, as_json)


def main() -> None:
    """The entry point: runs a command. A user's mistake becomes one line and exit code 2, a defect one and code 1."""
    try:
        try:
            cli()
        finally:
            sys.stdout.flush()
    except UserError as error:
        print(f"retention-tui: {error}", file=sys.stderr)
        raise SystemExit(ExitCode.BAD_INPUT) from None
    except (BrokenPipeError, SystemExit) as error:
        if isinstance(error, SystemExit) and not isinstance(error.__context__, BrokenPipeError):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the reader left; nothing more to say
        raise SystemExit(ExitCode.OK) from None
    except Exception as error:
        with tempfile.NamedTemporaryFile("w", prefix="retention-tui-", suffix=".txt", delete=False) as details:
            traceback.print_exc(file=details)
        print(f"retention-tui: internal error: {error!r}; details in {details.name}", file=sys.stderr)
        raise SystemExit(ExitCode.DEFECT) from None


def _attend(session: Session, no_screen: bool, as_json: bool) -> int:
    """Stays with a started run until it has ended, with a screen where there is a terminal."""
    if not (no_screen or as_json) and _has_terminal() and not session.interrupted:
        return _show(session)
    assert session.client is not None
    headless.follow(session.client, as_json=as_json)
    return _finish(session)


def _show(session: Session) -> int:
    """Shows the app. It may be left, fail, or lose its terminal before the run has ended: the run goes on."""
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
            app = RetentionApp(session, session.client, terminal.driver_class)
            choice = app.run()
            failed = bool(app.return_code)
        except Exception:
            traceback.print_exc()
            failed = True
    if session.client is None:
        if failed:
            sys.stderr.write(terminal.printed())
        return _finish(session) or (ExitCode.DEFECT if failed else ExitCode.OK)
    if (choice == "detach" or failed) and not session.interrupted:
        session.client.send(Resume())  # a paused run would wait for ever: nobody is left to go on with it
    if terminal.lost:  # nobody reads here; the run's log has it all
        return _finish(session)
    run = session.client.run
    if failed and not terminal.leaving:
        print(f"retention-tui: the screen failed (see {run.log_path}); the run goes on without it", file=sys.stderr)
    if choice == "detach" and session.running and not session.interrupted:
        print(f"{run.name} goes on here without its screen; Ctrl+C stops it with a checkpoint", flush=True)
    told = headless.follow(session.client)
    code = _finish(session)
    if not told and session.ended is not None and session.ended.exit_code == ExitCode.OK:
        print(f"{run.name}: {describe(session.ended)}")
    return code


def _finish(session: Session) -> int:
    """Waits for the run; a failed one's reason is told in one line."""
    code = session.finish()
    if session.ended is not None and session.ended.exit_code != ExitCode.OK:
        print(f"retention-tui: {session.ended.reason}", file=sys.stderr)
    return code


def _launch(session: Session, start: Callable[[], object]) -> None:
    """Starts a run that a signal stops. While ranks look for each other no handler runs, and any signal ends it."""
    if ranks_launched() == 1:
        _stop_on_signals(session)
        start()
    else:
        start()
        session.join_ranks()
        _stop_on_signals(session)


def _assist(session: Session, start: Callable[[], object]) -> int:
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
        elif session.client is None:  # nothing to be saved yet
            raise SystemExit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def _has_terminal() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


def _is_helper_rank() -> bool:
    return int(os.environ.get("MLX_RANK", "0")) > 0
