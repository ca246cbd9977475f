"""Commands of the user's own that are run when something happens to a run, for people who are away.

A hook gets the event as one line of JSON on standard input: the fields of `engine.events.to_json`, and

    hook        finish, alarm or failure
    run, directory, summary             the run's name and folder, and what happened in one line
    step, total_steps, loss, val_loss, best_val_loss        where the run stands, as far as it is known
    earlier     of an alarm: the texts of those before it that were not told on their own

and in its environment `RETENTION_TUI_HOOK`, `_RUN`, `_RUN_DIRECTORY` and `_SUMMARY`: enough for a line of shell.

Hooks run one after the other in a thread of their own, each for a limited time. Whatever becomes of them is a line in
the run's log and never an error of the run.
"""

from __future__ import annotations

import contextlib
import json
import math
import threading
import time
from collections import deque

from engine.config import Hooks
from engine.errors import ExitCode
from engine.events import Alarm, Event, RunEnded, RunOpened, State, StepCompleted, Validated, plain, to_json
from engine.hook_process import run_hook
from engine.lines import describe
from engine.store import RunDirectory
from engine.worker import Mailbox

_POLL_SECONDS = 0.25  # a wait for every single step would be felt by training
_EARLIER_KEPT = 20
_LINES_LOGGED = 20


class HookRunner:
    """Runs the hooks of one run, whose events come through `mailbox`.

    Alarms come in bursts: after one was told, those of the next `alarm_pause_seconds` are told together. The process
    does not exit before the hook of the run's end is done or its time is up.
    """

    def __init__(self, hooks: Hooks, run: RunDirectory, mailbox: Mailbox) -> None:
        self._hooks, self._run, self._mailbox = hooks, run, mailbox
        self._commands = hooks.commands()
        self._known: dict[str, float] = {}
        self._bests: list[tuple[int, float]] = []  # the steps that were the best so far, with their losses
        self._alarms: deque[Alarm] = deque(maxlen=_EARLIER_KEPT + 1)
        self._untold = 0
        self._next_alarm = -math.inf
        self._end_is_told, self._end_is_settled = True, threading.Event()
        self._end_is_settled.set()
        # Not a daemon: the interpreter waits for it, and it ends soon after the run does.
        self._thread = threading.Thread(target=self._work, name=f"hooks of {run.name}")

    def start(self) -> None:
        """Begins to listen; it ends by itself once the run has."""
        self._thread.start()

    def hold_end(self) -> None:
        """From now on a stop is told only once `settle_end` has said that it is the run's end."""
        self._end_is_settled.clear()

    def settle_end(self, told: bool) -> None:
        """Whether a stop is told; not where another process goes on with the run."""
        self._end_is_told = told
        self._end_is_settled.set()

    def join(self, timeout_seconds: float | None = None) -> bool:
        """Waits for the last hook; false if it is still running."""
        self._thread.join(timeout_seconds)
        return not self._thread.is_alive()

    def _work(self) -> None:
        while True:
            for event in self._mailbox.take():
                if isinstance(event, RunEnded):
                    self._tell_alarms()
                    self._end_is_settled.wait()
                    if self._end_is_told or event.state is not State.STOPPED:
                        self._call("finish" if event.exit_code == ExitCode.OK else "failure", event)
                    return
                self._take(event)
            if time.monotonic() >= self._next_alarm:
                self._tell_alarms()
            time.sleep(_POLL_SECONDS)

    def _take(self, event: Event) -> None:
        match event:
            case Alarm() if "alarm" in self._commands:
                self._alarms.append(event)
                self._untold += 1
                if self._untold == 1 and (wait := self._next_alarm - time.monotonic()) > 0:
                    self._log(f"hook alarm: alarms of the next {wait:.0f} s are told together")
            case RunOpened():
                self._known = {"step": event.step, "total_steps": event.total_steps}
                self._bests = [best for best in self._bests if best[0] <= event.step]  # it may have gone back
            case StepCompleted():
                self._known |= {"step": event.step, "loss": event.metrics["loss"]}
            case Validated():
                self._known |= event.metrics
                if event.best:
                    self._bests.append((event.step, event.metrics["val_loss"]))

    def _tell_alarms(self) -> None:
        if not self._alarms:
            return
        *earlier, newest = self._alarms
        count, self._untold = self._untold, 0
        self._alarms.clear()
        self._call("alarm", newest, earlier=[alarm.text for alarm in earlier], count=count)
        self._next_alarm = time.monotonic() + self._hooks.alarm_pause_seconds

    def _call(self, hook: str, event: Event, earlier: list[str] | None = None, count: int = 1) -> None:
        """Runs one hook and writes to the log how it went."""
        command = self._commands.get(hook)
        if command is None:
            return
        summary, folder = self._summary(event, count), str(self._run.path.absolute())
        told = {
            **plain(self._known | ({"best_val_loss": self._bests[-1][1]} if self._bests else {})),
            **json.loads(to_json(event)),
            "hook": hook,
            "run": self._run.name,
            "directory": folder,
            "summary": summary,
        }
        if earlier is not None:
            told["earlier"] = earlier
        variables = {
            "RETENTION_TUI_HOOK": hook,
            "RETENTION_TUI_RUN": self._run.name,
            "RETENTION_TUI_RUN_DIRECTORY": folder,
            "RETENTION_TUI_SUMMARY": summary,
        }
        line = json.dumps(told, allow_nan=False) + "\n"  # a folder may have any bytes for a name
        started = time.monotonic()
        try:
            problem, output = run_hook(command, line.encode(), variables, self._hooks.limit_seconds)
        except Exception as error:  # no such program, no memory for a process …
            problem, output = str(error), ""
        seconds = time.monotonic() - started
        self._log(f"hook {hook}: {f'failed: {problem}' if problem else f'done in {seconds:.1f} s'}")
        for said in output.splitlines()[:_LINES_LOGGED]:
            self._log(f"hook {hook} | {said}")

    def _summary(self, event: Event, count: int) -> str:
        words = f"{self._run.name}: {describe(event)}"
        if isinstance(event, RunEnded) and self._bests:
            words += f"; best held-out loss {self._bests[-1][1]:.3f}"
        if count > 1:
            words += f" (and {count - 1} more since the last)"
        return _printable(words)

    def _log(self, text: str) -> None:
        clock = time.strftime("%Y-%m-%d %H:%M:%S")
        # The disk may be full, and the folder of a run that never began is gone.
        with contextlib.suppress(OSError), self._run.log_path.open("a", encoding="utf-8") as log:
            log.write(f"{clock}  {_printable(text)}\n")


def _printable(text: str) -> str:
    """One line without anything that a terminal obeys or an environment cannot hold."""
    return "".join(character if character.isprintable() else " " for character in text)
