"""The user's own settings, in one TOML file: what concerns their machine and not a run.

    [hooks]
    finish = 'ntfy publish my-topic "$RETENTION_TUI_SUMMARY"'     # a line for the shell
    alarm = ["/home/me/bin/tell", "--loud"]                       # or a program and its arguments, without a shell
    failure = "mail -s 'training failed' me@example.org"          # the event is on standard input

Hooks are read from here alone, never from a profile: a profile may come from a stranger.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from pathlib import Path
from typing import Annotated, Any

import platformdirs
from pydantic import PlainValidator, ValidationError
from pydantic_core import ErrorDetails

from engine.errors import UserError
from engine.profile_section import Section, quantity


def _command(value: Any) -> str | list[str]:
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, list) and value and all(isinstance(word, str) for word in value) and value[0]:
        return value
    raise ValueError("should be a line for the shell, or a list of a program and its arguments")


Command = Annotated[str | list[str], PlainValidator(_command)]
"""A string is a line for /bin/sh, a list is run as it is."""


class Hooks(Section):
    """`[hooks]`: what is run when something happens to a run (`engine.hooks` says how)."""

    finish: Annotated[Command | None, quantity("when a run has finished, or was stopped on request")] = None
    alarm: Annotated[Command | None, quantity("when a run raises an alarm")] = None
    failure: Annotated[Command | None, quantity("when a run has failed, or a guard has stopped it")] = None
    limit_seconds: Annotated[float, quantity("a hook that takes longer is ended", unit="seconds", gt=0, le=600)] = 30
    alarm_pause_seconds: Annotated[
        float, quantity("alarms that come sooner after one that was told are told together", unit="seconds", ge=0)
    ] = 60

    def commands(self) -> dict[str, str | list[str]]:
        """Those that are set, by name."""
        named = {"finish": self.finish, "alarm": self.alarm, "failure": self.failure}
        return {name: command for name, command in named.items() if command is not None}


class Config(Section):
    """The whole file."""

    hooks: Hooks = Hooks()


def config_path() -> Path:
    """`$RETENTION_TUI_CONFIG`, or config.toml in the platform's configuration folder."""
    override = os.environ.get("RETENTION_TUI_CONFIG")
    return Path(override) if override else platformdirs.user_config_path("retention-tui") / "config.toml"


def load_config() -> Config:
    """Reads the file; there need not be one. Raises `UserError` with one line for what is wrong in it."""
    path = config_path()
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        if "RETENTION_TUI_CONFIG" in os.environ:
            raise UserError(f"{path}, named by $RETENTION_TUI_CONFIG: no such file") from None
        return Config()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: not valid TOML: {error}") from None
    try:
        return Config.model_validate(table)
    except ValidationError as error:
        raise UserError(f"{path}: {_describe(error.errors(include_url=False)[0])}") from None


def _describe(problem: ErrorDetails) -> str:
    *tables, name = (str(part) for part in problem["loc"])
    key = ".".join([*tables, name])
    if problem["type"] == "extra_forbidden":
        known = list((Hooks if tables else Config).model_fields)
        close = difflib.get_close_matches(name, known, n=1)
        return f"{key} is not known; " + (f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}")
    words = problem["msg"].removeprefix("Value error, ").replace("Input should be", "should be")
    return f"{key} = {problem['input']!r}: {words}"
