"""Asks programs for what only they can say, without ever waiting for one."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass

_EVERY_SECONDS = 10.0
_PATIENCE_SECONDS = 5.0


@dataclass
class _Question:
    answer: str | None = None
    asked_at: float = float("-inf")


class Programs:
    """Programs that are asked again and again: each at most every ten seconds, one at a time, five seconds at most.

    `answer` gives what a program said last; `turn`, to be called once a look, takes the answer of the one that is
    running, kills it if it hangs, and starts the next. A `patient` one waits for each program's first answer instead.
    Not for several threads.
    """

    def __init__(
        self, patient: bool = False, every_seconds: float = _EVERY_SECONDS, patience_seconds: float = _PATIENCE_SECONDS
    ) -> None:
        self._patient, self._every, self._patience = patient, every_seconds, patience_seconds
        self._questions: dict[tuple[str, ...], _Question] = {}
        self._running: tuple[_Question, subprocess.Popen[bytes]] | None = None

    def answer(self, *command: str) -> str:
        """What it printed last. `LookupError` where it has not answered yet, is not there, has failed or hung."""
        question = self._questions.setdefault(command, _Question())
        if self._patient and question.asked_at == float("-inf"):
            self._collect(self._patience)
            self._ask(command)
            self._collect(self._patience)
        if question.answer is None:
            raise LookupError(f"{command[0]} has not answered")
        return question.answer

    def turn(self) -> None:
        """Goes on to the next program, if it is time."""
        self._collect()
        if self._running is None and self._questions:
            # The one that has waited longest, so that others that hang cannot starve it.
            command = min(self._questions, key=lambda each: self._questions[each].asked_at)
            if time.monotonic() >= self._questions[command].asked_at + self._every:
                self._ask(command)

    def _ask(self, command: tuple[str, ...]) -> None:
        question = self._questions[command]
        question.asked_at = time.monotonic()
        program = shutil.which(command[0])
        if program is None:
            question.answer = None
            return
        try:
            process = subprocess.Popen(
                [program, *command[1:]],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                close_fds=False,  # Python's files close by themselves; so macOS need not fork a large process for it
            )
        except OSError:
            question.answer = None
        else:
            self._running = (question, process)

    def _collect(self, patience_seconds: float = 0.0) -> None:
        """Takes the answer of the program that is running, if it has ended, or ends it if it hangs."""
        if self._running is None:
            return
        question, process = self._running
        with suppress(subprocess.TimeoutExpired):
            process.wait(patience_seconds)
        if process.returncode is None and time.monotonic() < question.asked_at + self._patience:
            return
        self._running = None
        assert process.stdout is not None
        with process.stdout as output:
            if process.returncode is None:
                process.kill()
            os.set_blocking(output.fileno(), False)  # what it started and left behind may hold the other end
            text = (output.read() or b"").decode(errors="replace")
            question.answer = text if process.returncode == 0 else None
