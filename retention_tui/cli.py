"""The command line. Everything that the screen can do, it can do too: both send commands and read events."""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer

from engine.commands import Generate
from engine.errors import ExitCode, UserError
from retention_tui import attend, listings, watch, wording
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
InBackground = Annotated[
    bool, typer.Option("--background", help="in a process of its own, which outlives this terminal; shows it")
]
Json = Annotated[bool, typer.Option("--json", help="one JSON object a line")]
RunName = Annotated[str, typer.Argument(metavar="RUN", help="a run's name, or its folder")]
Anyway = Annotated[bool, typer.Option("--anyway", help="also where this machine has not enough memory")]
RUNS = Path("runs")
SET = "override a key of the profile, e.g. train.steps=50; may be given several times"


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
        if not attend.has_terminal():
            raise UserError("no terminal here for the app; try: retention-tui run PROFILE --headless, or --help")
        raise SystemExit(attend.show(Session(runs_dir)))


@cli.command()
def run(
    profile: Annotated[str, typer.Argument(metavar="PROFILE", help="a profile's name, or its file")],
    overrides: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help=SET)] = None,
    name: Annotated[str | None, typer.Option(help="the run's name; PROFILE, PROFILE-2 … if absent")] = None,
    runs_dir: RunsDir = RUNS,
    no_screen: Headless = False,
    as_json: Json = False,
    in_background: InBackground = False,
    anyway: Anyway = False,
) -> None:
    """Train a profile."""
    session = Session(runs_dir)
    if in_background:
        begin = partial(session.start_in_background, profile, overrides or (), name, anyway)
        raise SystemExit(watch.start(session, begin, no_screen=no_screen, as_json=as_json))
    if attend.is_helper_rank():
        raise SystemExit(attend.assist(session, lambda: session.assist(profile, overrides or (), name)))
    attend.launch(session, lambda: session.start(profile, overrides or (), name, anyway))
    raise SystemExit(attend.attend(session, no_screen, as_json))


@cli.command()
def resume(
    run_name: RunName,
    step: Annotated[str, typer.Option("--from", metavar="STEP", help="latest, best or a checkpoint's step")] = "latest",
    runs_dir: RunsDir = RUNS,
    no_screen: Headless = False,
    as_json: Json = False,
    in_background: InBackground = False,
) -> None:
    """Go on with a run, exactly, from a checkpoint."""
    session = Session(runs_dir)
    if in_background:
        begin = partial(session.resume_in_background, run_name, step)
        raise SystemExit(watch.start(session, begin, no_screen=no_screen, as_json=as_json))
    if attend.is_helper_rank():
        raise SystemExit(attend.assist(session, lambda: session.assist_resume(run_name)))
    attend.launch(session, lambda: session.resume(run_name, step))
    raise SystemExit(attend.attend(session, no_screen, as_json))


@cli.command("watch")
def watch_run(
    run_name: RunName,
    runs_dir: RunsDir = RUNS,
    no_screen: Headless = False,
    as_json: Json = False,
    look: Annotated[bool, typer.Option("--look", help="for looking only: nothing can be steered")] = False,
    web: Annotated[bool, typer.Option("--web", help="show it to a browser, for looking only")] = False,
    host: Annotated[str, typer.Option(help="with --web: the address to serve on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="with --web: the port")] = 8000,
) -> None:
    """Show a live run of another process, and steer it."""
    if web:
        if look or no_screen or as_json:
            raise UserError("watch --web is for looking only anyway, and takes no --look, --headless or --json")
        from retention_tui.web import serve

        raise SystemExit(serve(runs_dir, run_name, host, port))
    session = Session(runs_dir)
    raise SystemExit(watch.watch(session, run_name, no_screen=no_screen, as_json=as_json, looks_only=look))


@cli.command()
def control(
    run_name: RunName,
    action: Annotated[str, typer.Argument(metavar="ACTION", help=f"{', '.join(watch.ACTIONS)} or set")],
    setting: Annotated[str | None, typer.Argument(metavar="KEY=VALUE", help="what to set")] = None,
    runs_dir: RunsDir = RUNS,
) -> None:
    """Steer a live run: pause, resume, checkpoint, validate, stop, or set KEY=VALUE."""
    raise SystemExit(watch.control(runs_dir, run_name, action, setting))


@cli.command()
def generate(
    run_name: Annotated[
        str, typer.Argument(metavar="RUN", help="a run's name or folder, or the folder of an adapter or a model")
    ],
    prompt: Annotated[str, typer.Option("--prompt", "-p", metavar="TEXT", help="a text to go on from, or a message")],
    checkpoint: Annotated[str, typer.Option(help="latest, best or a checkpoint's step")] = "latest",
    max_tokens: Annotated[int, typer.Option(min=1)] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 always takes the likeliest token")] = 0.7,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 0.9,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    runs_dir: RunsDir = RUNS,
) -> None:
    """Continue a text with a run's model; one that was tuned for chats answers a message."""
    from engine.speaker import continue_text  # loads MLX

    ask = Generate("command line", prompt, max_tokens, temperature, top_p, seed)
    for piece in continue_text(runs_dir, run_name, checkpoint, ask, _report):
        sys.stdout.write(wording.printable(piece) if sys.stdout.isatty() else piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


def _report(text: str) -> None:
    print(f"retention-tui: {text}", file=sys.stderr)


@cli.command()
def fuse(
    run_name: Annotated[str, typer.Argument(metavar="RUN", help="a run's name or folder, or an adapter's folder")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="a folder that is not there yet")],
    checkpoint: Annotated[str, typer.Option(help="best, latest or a checkpoint's step")] = "best",
    dequantize: Annotated[bool, typer.Option("--dequantize", help="undo the quantization of the base")] = False,
    gguf: Annotated[bool, typer.Option("--gguf", help="for llama.cpp as well: Llama, Mistral and Mixtral")] = False,
    runs_dir: RunsDir = RUNS,
) -> None:
    """Add a run's adapter to its base: a Hugging Face folder of its own."""
    from engine.fuse import fuse as write_fused  # loads MLX

    write_fused(runs_dir, run_name, output, _report, checkpoint=checkpoint, dequantize=dequantize, gguf=gguf)
    print(output)


@cli.command()
def queue(
    profiles: Annotated[list[str] | None, typer.Argument(metavar="PROFILE…", help="names or files, in order")] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help=SET)] = None,
    go_on: Annotated[bool, typer.Option("--continue", help="go on with the queue that was stopped or killed")] = False,
    anyway: Anyway = False,
    runs_dir: RunsDir = RUNS,
    _: Annotated[bool, typer.Option("--headless", help="lines only, as ever: `watch` shows a run of it")] = False,
) -> None:
    """Train profiles one after the other, each in a process of its own."""
    from retention_tui.queue_record import new_queue, unfinished_queue
    from retention_tui.run_queue import Queue

    if go_on == bool(profiles):
        raise UserError("queue: give it profiles in a row, or --continue for the one that was stopped")
    if go_on and (overrides or anyway):
        raise UserError("queue: --continue goes on as the queue was begun; --set and --anyway are for a new one")
    record = unfinished_queue(runs_dir) if go_on else new_queue(runs_dir, profiles or (), overrides or (), anyway)
    if record is None:
        print(f"nothing is left to do of the queues in {runs_dir}")
    else:
        raise SystemExit(Queue(record, runs_dir).work())


@cli.command()
def runs(runs_dir: RunsDir = RUNS, as_json: Json = False) -> None:
    """List the runs."""
    listings.print_runs(runs_dir, as_json)


@cli.command()
def show(run_name: RunName, runs_dir: RunsDir = RUNS, as_json: Json = False) -> None:
    """Tell about one run: where it stands, its checkpoints and alarms."""
    listings.print_run(runs_dir, run_name, as_json)


@cli.command()
def report(run_name: RunName, runs_dir: RunsDir = RUNS, as_json: Json = False) -> None:
    """Tell the whole story of one run on a page: attempts, alarms, what guards did, how it ended."""
    listings.print_report(runs_dir, run_name, as_json)


@cli.command()
def export(
    run_name: RunName,
    form: Annotated[str, typer.Option("--format", help="csv, jsonl or adapters")] = "csv",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="a file, standard output if absent; for adapters a new folder")
    ] = None,
    runs_dir: RunsDir = RUNS,
) -> None:
    """Write every step's metrics, in full precision, or the adapters of every checkpoint as mlx-lm lays them out."""
    if form == "adapters":
        from engine.fuse import export_adapters  # loads MLX

        if output is None:
            raise UserError("export --format adapters needs -o with a folder that is not there yet")
        export_adapters(runs_dir, run_name, output, _report)
        print(output)
    else:
        listings.export_run(runs_dir, run_name, form, output)


@cli.command()
def profiles(as_json: Json = False) -> None:
    """List the profiles."""
    listings.print_profiles(as_json)


@cli.command()
def plan(
    profile: Annotated[str, typer.Argument(metavar="PROFILE", help="a profile's name or file, or a run's folder")],
    overrides: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help=SET)] = None,
    measured: Annotated[bool, typer.Option("--measure", help="take real steps too, with random tokens")] = False,
    runs_dir: RunsDir = RUNS,
    as_json: Json = False,
) -> None:
    """Tell what a profile will need: memory, part by part, and time; and what would fit where it does not.

    The verdict is `verdict` in --json: green, yellow, red or unknown. The exit code of every plan that is made is 0.
    """
    from retention_tui.plan_view import print_plan

    print_plan(profile, overrides or (), runs_dir, measured=measured, as_json=as_json)


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
