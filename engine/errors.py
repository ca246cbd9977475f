"""Errors that a user can cause, and the exit codes of the command line."""

from __future__ import annotations

from enum import IntEnum


class UserError(Exception):
    """Bad usage, profile, data or checkpoint.

    The message is one line for the user: what is wrong, where, and what would be right.
    """


class ExitCode(IntEnum):
    OK = 0
    DEFECT = 1
    BAD_INPUT = 2
    MEMORY = 3
    DIVERGED = 4
