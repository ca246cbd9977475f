"""The thread that owns MLX: commands in, events out, nothing else."""

from __future__ import annotations

import contextlib
import gc
import threading
import time
import traceback
from collections import deque
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

from engine.commands import Command, Generate
from engine.errors import ExitCode, UserError
from engine.events import Alarm, AnswerEnded, Event, LoadingProgress, Reading, RunEnded, State, StepCompleted
from engine.host.mlx_variables import set_mlx_variables
from engine.journal import Journal
from engine.loading import Interrupted
from engine.profile import Profile
from engine.store import RunDirectory
from engine.vigil import Vigil

if TYPE_CHECKING:
    from engine.host import Machine
    from engine.ranks import Ranks

_KEPT = 4096
_FREQUENT = (StepCompleted, Reading, LoadingProgress)


class Mailbox:
    """Events for one reader, who may be slow or gone: the engine never waits for it.

    It is bounded by thinning steps and readings out, oldest first; no other event is lost.
    """

    def __init__(self) -> None:
        self._events: deque[Event] = deque()
        self._frequent = 0
        self._arrived = threading.Condition()

    def put(self, event: Event) -> None:
        with self._arrived:
            self._events.append(event)
            self._frequent += isinstance(event, _FREQUENT)
            if self._frequent > 2 * _KEPT:
                self._thin_out()
            self._arrived.notify()

    def take(self, timeout_seconds: float = 0.0) -> list[Event]:
        """All events since the last call, oldest first; waits at most `timeout_seconds` for a first one."""
        with self._arrived:
            if not self._events and timeout_seconds:
                self._arrived.wait(timeout_seconds)
            taken = list(self._events)
            self._events.clear()
            self._frequent = 0
        return taken

    def _thin_out(self) -> None:
        surplus = self._frequent - _KEPT
        kept: deque[Event] = deque()
        for event in self._events:
            if surplus and isinstance(event, _FREQUENT):
                surplus -= 1
            else:
                kept.append(event)
        self._events, self._frequent = kept, _KEPT


class Engine:
    """One run in one thread of this process. Make it, subscribe, start it, send it commands, join it.

    `resume_from` is None for a new run, `latest`, or a step's number. One that `assists` another process's run says and
    writes nothing; its `run` is only where other runs are found. `machine` is looked at while it trains: this one if
    None. `warning` is what its plan says, for the owner.
    """

    def __init__(
        self,
        run: RunDirectory,
        profile: Profile,
        resume_from: str | None = None,
        assists: bool = False,
        machine: Machine | None = None,
        look_every_seconds: float = 1.0,
        warning: str = "",
    ) -> None:
        self.run, self.profile = run, profile
        self.ended: RunEnded | None = None
        self.joined = threading.Event()
        """Set once this run's ranks have found each other, or will not any more."""
        self._resume_from, self._assists, self._warning = resume_from, assists, warning
        self._ranks: Ranks | None = None
        self._inbox: SimpleQueue[Command] = SimpleQueue()
        self._mailboxes: list[Mailbox] = []
        self._vigil = Vigil(run, profile, self._say, machine, look_every_seconds)
        self._thread = threading.Thread(target=self._work, name=f"engine of {run.name}")

    def subscribe(self) -> Mailbox:
        """A new reader of everything that is said from now on."""
        mailbox = Mailbox()
        self._mailboxes.append(mailbox)
        return mailbox

    def start(self) -> None:
        self._thread.start()

    def send(self, command: Command) -> None:
        """Hands a command to the worker; never waits."""
        self._inbox.put(command)

    def join(self, timeout_seconds: float | None = None) -> RunEnded | None:
        """Waits for the end; None if it has not come in time."""
        self._thread.join(timeout_seconds)
        return self.ended

    @property
    def waiting_seconds(self) -> float:
        """For how long it has been waiting for another rank; 0 while it computes."""
        since = self._ranks.waiting_since if self._ranks else None
        return time.monotonic() - since if since is not None else 0.0

    def _say(self, event: Event) -> None:
        for mailbox in self._mailboxes:
            mailbox.put(event)

    def _work(self) -> None:
        try:
            ended = self._work_to_the_end()
        except Exception as error:  # not even MLX could be loaded
            self._log_traceback()
            reason = f"internal error: {error!r}; details {self._details}"
            ended = RunEnded(state=State.FAILED, reason=reason, exit_code=ExitCode.DEFECT, step=0)
        self.joined.set()
        self._end_unheard()
        self._say(ended)
        self.ended = ended

    def _work_to_the_end(self) -> RunEnded:
        set_mlx_variables(self.profile.host)  # before MLX is loaded; the vigil says what of it could not be
        from engine.backend import is_out_of_memory, mx  # MLX's streams belong to the thread that first uses them
        from engine.outcome import Outcome
        from engine.ranks import Ranks
        from engine.trainer import Trainer

        journal: Journal | None = None
        trainer: Trainer | None = None
        try:
            ranks = self._ranks = Ranks()
            self.joined.set()
            journal = Journal(None if self._assists else self.run, self._say)
            journal.enter(State.LOADING, "data and model")
            if not self._assists:
                self._vigil.start()
            if self._warning:
                journal.say(Alarm(level="warning", text=self._warning, guard="plan"))
            trainer = Trainer(self.run, self.profile, ranks, journal, self._inbox, self._vigil, self._resume_from)
            outcome = trainer.train()
        except UserError as error:
            outcome = Outcome(State.FAILED, str(error), ExitCode.BAD_INPUT)
        except Interrupted as error:
            outcome = Outcome(State.STOPPED, f"{error}, before it had begun", ExitCode.OK)
        except Exception as error:  # a defect of ours: the log gets the traceback, the user one line
            self._log_traceback()
            reason, code = f"internal error: {error!r}", ExitCode.DEFECT
            if is_out_of_memory(error):
                words = " ".join(str(error).split())
                reason, code = f"out of memory ({words}): the model itself does not fit", ExitCode.MEMORY
            outcome = Outcome(State.FAILED, f"{reason}; details {self._details}", code)
        step = trainer.progress.step if trainer else 0
        ended = RunEnded(state=outcome.state, reason=outcome.reason, exit_code=outcome.exit_code, step=step)
        try:
            self._vigil.stop()
            if journal is not None:
                for event in self._vigil.kept():
                    journal.store(event)
                journal.end(ended)
        except Exception:  # what the run came to is told all the same
            self._log_traceback()
        finally:
            trainer = None
            gc.collect()  # compiled functions and what they close over hold each other, and a whole model
            mx.clear_streams()  # else the process may abort at exit
        return ended

    def _end_unheard(self) -> None:
        """Tells those whose question came too late for the trainer to hear it."""
        with contextlib.suppress(Empty):
            while True:
                command = self._inbox.get_nowait()
                if isinstance(command, Generate):
                    self._say(AnswerEnded(answer=command.answer, reason="run ended", tokens=0, seconds=0.0))

    @property
    def _details(self) -> str:
        return "above" if self._assists else f"in {self.run.log_path}"

    def _log_traceback(self) -> None:
        if self._assists:
            traceback.print_exc()
            return
        with contextlib.suppress(OSError), self.run.log_path.open("a", encoding="utf-8") as log:
            log.write(traceback.format_exc())
