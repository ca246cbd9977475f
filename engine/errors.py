"""Errors that a user can cause, and the exit codes of the command line."""

from __future__ import annotations

from enum import IntEnum


class UserError(Exception):
    """Bad usage, profile, data or checkpoint.

    The message is one line for the user: what is wrong, where, and what would be right. Whatever it quotes, it stays
    one line: characters that are not printable are escaped.
    """

    def __init__(self, message: str) -> None:
        super().__init__("".join(char if char.isprintable() else _escaped(char) for char in message))


def _escaped(char: str) -> str:
    return " " if char == "\n" else char.encode("unicode_escape").decode()


class ExitCode(IntEnum):
    OK = 0
    DEFECT = 1
    BAD_INPUT = 2
    MEMORY = 3
    DIVERGED = 4
