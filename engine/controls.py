"""The trainer's ear: takes commands from the queue and remembers what they ask for."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from queue import Empty, SimpleQueue

from engine.commands import (
    CancelGeneration,
    Checkpoint,
    Command,
    Generate,
    Pause,
    Resume,
    Set,
    Stop,
    Validate,
)
from engine.errors import ExitCode
from engine.events import State
from engine.outcome import Outcome


class Controls:
    """What was asked and not yet done. Chats are handed on at once; the rest waits for a safe place in the loop."""

    def __init__(
        self,
        inbox: SimpleQueue[Command],
        ask: Callable[[Generate], None],
        cancel_answer: Callable[[str], None],
    ) -> None:
        self._inbox, self._ask, self._cancel_answer = inbox, ask, cancel_answer
        self.ending: Outcome | None = None
        """How the run shall end, once that was asked for."""
        self.held = ""
        """Why a guard holds the run, in words; empty while none does. The owner's `Resume` overrules it."""
        self._paused = self._checkpoint = self._validate = False
        self._settings: list[Set] = []

    def waits(self) -> bool:
        """Whether the run shall wait, as asked by its owner or by a guard."""
        return (self._paused or bool(self.held)) and self.ending is None

    def listen(self, timeout_seconds: float = 0.0) -> None:
        """Takes every command that is waiting; waits for a first one at most `timeout_seconds`."""
        try:
            self._take(self._inbox.get(timeout=timeout_seconds) if timeout_seconds else self._inbox.get_nowait())
            while True:
                self._take(self._inbox.get_nowait())
        except Empty:
            return

    def take(self, commands: Iterable[Command]) -> None:
        """What was asked for before it could be listened to."""
        for command in commands:
            self._take(command)

    def end(self, outcome: Outcome) -> None:
        """The run shall end so; what was asked first stays."""
        self.ending = self.ending or outcome

    def checkpoint_asked(self) -> bool:
        """True once after a checkpoint was asked for."""
        asked, self._checkpoint = self._checkpoint, False
        return asked

    def validation_asked(self) -> bool:
        """True once after a validation was asked for."""
        asked, self._validate = self._validate, False
        return asked

    def settings_asked(self) -> list[Set]:
        """The settings that were asked for since the last call."""
        asked, self._settings = self._settings, []
        return asked

    def _take(self, command: Command) -> None:
        match command:
            case Pause():
                self._paused = True
            case Resume():
                self._paused = False
                self.held = "" if command.overrule else self.held
            case Checkpoint():
                self._checkpoint = True
            case Validate():
                self._validate = True
            case Stop():
                self.end(Outcome(State.STOPPED, command.reason, ExitCode.OK, command.checkpoint))
            case Set():
                self._settings.append(command)
            case Generate():
                self._ask(command)
            case CancelGeneration():
                self._cancel_answer(command.answer)
