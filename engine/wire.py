"""Commands and events as lines of JSON, for another process. What comes in is believed only when it is exactly right.

    {"command": "set", "key": "train.learning_rate", "value": "1e-4"}
    {"event": "step", "time": 1764000000.0, "step": 12, …}           as `engine.events.to_json` writes it

A line that is not understood is a `WireError`, whose words may be sent back and logged; nothing else is ever raised.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import types
import typing
from collections.abc import Mapping
from enum import StrEnum
from typing import Any

from engine import events
from engine.commands import Command, Generate
from engine.events import Event, plain, to_json

PROTOCOL = 1
"""Both sides name it first; another one is refused in words."""
LONGEST_COMMAND_BYTES = 64 * 1024
LONGEST_EVENT_BYTES = 1024 * 1024
_LONGEST_WORDS = 1000
_COMMANDS: dict[str, type[Any]] = {
    re.sub(r"(?<=[a-z])(?=[A-Z])", "_", kind.__name__).lower(): kind for kind in typing.get_args(Command)
}
_NAMES = {kind: name for name, kind in _COMMANDS.items()}
_EVENTS: dict[str, type[Event]] = {
    kind.kind: kind
    for kind in vars(events).values()
    if isinstance(kind, type) and issubclass(kind, Event) and kind is not Event
}
_INTEGERS = range(-(2**63), 2**63)  # what SQLite can hold
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


class WireError(ValueError):
    """One line that is no command or event, and why."""


class Lines:
    """Bytes as they arrive, cut into lines of at most `longest_bytes`."""

    def __init__(self, longest_bytes: int) -> None:
        self._longest = longest_bytes
        self._rest = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """The lines that are complete now, without their ends. Raises `WireError` for one that is too long."""
        self._rest += data
        *lines, rest = bytes(self._rest).split(b"\n")
        self._rest = bytearray(rest)
        if max(map(len, (*lines, rest))) > self._longest:
            raise WireError(f"a line of more than {self._longest:,} bytes")
        return lines


def command_to_json(command: Command) -> str:
    """One line of JSON with a key `command` naming the kind."""
    fields = plain(dataclasses.asdict(command))
    return json.dumps({"command": _NAMES[type(command)], **fields}, ensure_ascii=True, allow_nan=False)


def event_to_line(event: Event, number: int | None = None) -> bytes:
    """One line of `engine.events.to_json`, with its end, and with a `number` before all else where it has one."""
    text = to_json(event)
    if number is not None:
        text = f'{{"number": {number}, {text[1:]}'
    return text.encode("utf-8", "replace") + b"\n"


def read_command(message: Mapping[str, Any]) -> Command:
    """The command in a message. Raises `WireError`."""
    command: Command = _read(message, "command", _COMMANDS)
    for field in dataclasses.fields(command):
        value = getattr(command, field.name)
        if isinstance(value, str) and field.name != "prompt":
            if _CONTROL.search(value):
                raise WireError(f"{field.name!r} has control characters")
            if len(value) > _LONGEST_WORDS:
                raise WireError(f"{field.name!r} has more than {_LONGEST_WORDS} characters")
    if isinstance(command, Generate):
        _check_ranges(command)
    return command


def read_event(message: Mapping[str, Any]) -> Event:
    """An event as it was before it became JSON: from the socket, or from the store. Raises `WireError`."""
    event: Event = _read({key: value for key, value in message.items() if key != "number"}, "event", _EVENTS)
    return event


def read_number(message: Mapping[str, Any]) -> int | None:
    """The number of a message, where it has one."""
    number = message.get("number")
    return number if type(number) is int else None


def parse(line: bytes) -> dict[str, Any]:
    """The JSON object in a line. Raises `WireError`."""
    try:
        message = json.loads(line.decode("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise WireError(f"no line of JSON: {reason}") from None
    if not isinstance(message, dict):
        raise WireError("no JSON object")
    return message


def _refuse_constant(name: str) -> None:
    raise WireError(f"{name} is no JSON")


def _check_ranges(ask: Generate) -> None:
    for name, fits, rule in (
        ("max_tokens", 1 <= ask.max_tokens <= 1_000_000, "1 to 1,000,000"),
        ("temperature", 0 <= ask.temperature <= 100, "0 to 100"),
        ("top_p", 0 <= ask.top_p <= 1, "0 to 1"),
        ("seed", ask.seed >= 0, "0 or more"),
    ):
        if not fits:  # also NaN
            raise WireError(f"{name!r} must be {rule}")


def _read(message: Mapping[str, Any], tag: str, kinds: Mapping[str, type[Any]]) -> Any:
    """Builds the dataclass that `message[tag]` names. Fields with a default may be missing."""
    name = message.get(tag)
    kind = kinds.get(name) if isinstance(name, str) else None
    if kind is None:
        raise WireError(f"unknown {tag} {_short(name)}; there are {', '.join(kinds)}" if name else f"no {tag!r} in it")
    hints, needed = _FIELDS[kind]
    given = {key: value for key, value in message.items() if key != tag}
    if unknown := [key for key in given if key not in hints]:
        raise WireError(f"{name} has no {_short(unknown[0])}")
    if missing := needed - set(given):
        raise WireError(f"{name} needs {min(missing)!r}")
    return kind(**{key: _value(value, hints[key], f"{name}: {key!r}") for key, value in given.items()})


def _fields(kind: type[Any]) -> tuple[dict[str, Any], frozenset[str]]:
    """The types of a dataclass's fields by name, and the names without a default."""
    hints = typing.get_type_hints(kind)
    needed = {
        field.name
        for field in dataclasses.fields(kind)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}, frozenset(needed)


_FIELDS = {kind: _fields(kind) for kind in (*_COMMANDS.values(), *_EVENTS.values())}


def _value(value: Any, hint: Any, where: str) -> Any:
    """A value of JSON as the annotated type: numbers, flags, words, mappings, and None where it is allowed."""
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        (hint,) = (choice for choice in typing.get_args(hint) if choice is not types.NoneType)
        origin = typing.get_origin(hint)
    if origin is Mapping and isinstance(value, dict):
        _, item = typing.get_args(hint)
        return {_text(key, where): _value(entry, item, f"{where} of {_short(key)}") for key, entry in value.items()}
    if hint is float and (isinstance(value, int | float | str) and not isinstance(value, bool)):
        return _float(value, where)
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        if value not in _INTEGERS:
            raise WireError(f"{where} is too large")
        return value
    if hint is bool and isinstance(value, bool):
        return value
    if isinstance(hint, type) and issubclass(hint, StrEnum) and value in tuple(hint):
        return hint(value)
    if hint is str and isinstance(value, str):
        return _text(value, where)
    raise WireError(f"{where} cannot be {_short(value)}")


def _float(value: float | str, where: str) -> float:
    """A number; as JSON has no NaN and no infinities, those are strings."""
    if isinstance(value, str) and value not in ("nan", "inf", "-inf"):
        raise WireError(f"{where} cannot be {_short(value)}")
    try:
        number = float(value)
    except OverflowError:
        raise WireError(f"{where} is too large") from None
    if not isinstance(value, str) and not math.isfinite(number):  # 1e999
        raise WireError(f"{where} is too large")
    return number


def _text(value: str, where: str) -> str:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise WireError(f"{where} is no Unicode text") from None
    return value


def _short(value: Any) -> str:
    """A value as a refusal quotes it: short, and in printable ASCII."""
    text = ascii(value)
    return text if len(text) <= 40 else f"{text[:37]}…"
