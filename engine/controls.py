"""The trainer's ear: takes commands from the queue and remembers what they ask for."""

from __future__ import annotations

from collections.abc import Callable
from queue import Empty, SimpleQueue

from engine.commands import (
    CancelGeneration,
    Checkpoint,
    Command,
    Generate,
    Pause,
    Resume,
    Stop,
    Validate,
)


class Controls:
    """What was asked and not yet done. Chats are handed on at once; the rest waits for a safe place in the loop."""

    def __init__(
        self,
        inbox: SimpleQueue[Command],
        ask: Callable[[Generate], None],
        cancel_answer: Callable[[str], None],
    ) -> None:
        self._inbox, self._ask, self._cancel_answer = inbox, ask, cancel_answer
        self.paused = False
        self.stop: Stop | None = None
        self._checkpoint = self._validate = False

    def listen(self, timeout_seconds: float = 0.0) -> None:
        """Takes every command that is waiting; waits for a first one at most `timeout_seconds`."""
        try:
            self._take(self._inbox.get(timeout=timeout_seconds) if timeout_seconds else self._inbox.get_nowait())
            while True:
                self._take(self._inbox.get_nowait())
        except Empty:
            return

    def checkpoint_asked(self) -> bool:
        """True once after a checkpoint was asked for."""
        asked, self._checkpoint = self._checkpoint, False
        return asked

    def validation_asked(self) -> bool:
        """True once after a validation was asked for."""
        asked, self._validate = self._validate, False
        return asked

    def _take(self, command: Command) -> None:
        match command:
            case Pause():
                self.paused = True
            case Resume():
                self.paused = False
            case Checkpoint():
                self._checkpoint = True
            case Validate():
                self._validate = True
            case Stop():
                self.stop = self.stop or command
            case Generate():
                self._ask(command)
            case CancelGeneration():
                self._cancel_answer(command.answer)
