"""Profiles as files: found by name or path, extended, overridden and validated, with errors of one line."""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from engine.errors import UserError
from engine.profile import LoRAProfile, Profile, parse_profile, profile_class


@dataclass(frozen=True)
class ProfileFile:
    """A profile that can be chosen by name, not yet validated."""

    name: str
    path: Path
    kind: str
    description: str
    own: bool
    """True for a profile from the user's own folder."""


def shipped_folder() -> Path:
    """The profiles of this release: inside the package when installed, beside it in a checkout."""
    inside = Path(__file__).parent / "profiles"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "profiles"


def own_folder() -> Path:
    """The user's own profiles (`$RETENTION_TUI_PROFILES` or the platform's configuration folder)."""
    override = os.environ.get("RETENTION_TUI_PROFILES")
    return Path(override) if override else platformdirs.user_config_path("retention-tui") / "profiles"


def list_profiles() -> list[ProfileFile]:
    """All profiles that can be named, the user's own last; one with a shipped name replaces the shipped one."""
    found: dict[str, ProfileFile] = {}
    for folder, own in ((shipped_folder(), False), (own_folder(), True)):
        for path in sorted(folder.glob("*.toml")):
            try:
                table = _read_profile(path)
            except UserError as error:
                table = {"kind": "?", "description": str(error)}
            kind, description = str(table.get("kind", "?")), str(table.get("description", ""))
            found[path.stem] = ProfileFile(path.stem, path, kind, description, own)
    return list(found.values())


def find_profile(name_or_path: str) -> Path:
    """The file of a profile given by name or by path.

    Raises `UserError` naming the nearest profile where there is none.
    """
    path = Path(name_or_path)
    if path.suffix == ".toml" or os.sep in name_or_path:
        if not path.is_file():
            raise UserError(f"profile {name_or_path}: no such file")
        return path
    profiles = {profile.name: profile.path for profile in list_profiles()}
    if name_or_path not in profiles:
        raise UserError(f"profile {name_or_path!r} is not known; {_nearest(name_or_path, profiles)}")
    return profiles[name_or_path]


def load_profile(name_or_path: str, overrides: Iterable[str] = ()) -> Profile:
    """Reads, extends, overrides (`train.steps=50`) and validates a profile.

    File paths come back absolute: those of a profile are relative to its folder, those of an override to the current
    one. What excludes another (`steps`, `epochs`, `tokens`; `builtin`, `files`) takes its place when it comes later.

    Raises `UserError` with one line: the file, the key, what is wrong and what would be right.
    """
    path = find_profile(name_or_path)
    table = _read_profile(path)
    for override in overrides:
        table = _merge(table, _parse_override(override))
    return _with_base_in_place(validate_profile(table, where=path.name))


def validate_profile(table: Mapping[str, Any], where: str) -> Profile:
    """The profile in a plain table, as TOML or run.json gives it; `where` is named in the error."""
    try:
        return parse_profile(table)
    except ValidationError as error:
        problems = error.errors(include_url=False)
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UserError(f"{where}: {_describe(problems[0], profile_class(table))}{more}") from None


def with_override(profile: Profile, override: str) -> Profile:
    """The profile with `train.steps=50` in force, validated. Raises `UserError` in one line."""
    table = _merge(profile.model_dump(mode="json", by_alias=True), _parse_override(override))
    return validate_profile(table, where=override)


def _read_profile(path: Path) -> dict[str, Any]:
    table = _read_table(path)
    base_name = table.pop("extends", None)
    if base_name is None:
        return table
    base_path = _find_base(str(base_name), path)
    base = _read_table(base_path)
    if "extends" in base:
        raise UserError(f"{path.name}: extends {base_name!r}, which extends another; one level is the most")
    return _merge(base, table)


def _find_base(name: str, path: Path) -> Path:
    # A user's own profile may carry the name of the shipped one that it extends.
    for folder in (path.parent, own_folder(), shipped_folder()):
        candidate = folder / f"{name}.toml"
        if candidate.is_file() and not candidate.samefile(path):
            return candidate
    known = {profile.name for profile in list_profiles()} - {path.stem}
    raise UserError(f"{path.name}: extends {name!r}, which is not known; {_nearest(name, known)}")


def _read_table(path: Path) -> dict[str, Any]:
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"profile {path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise UserError(f"profile {path}: not UTF-8 text") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"profile {path}: not valid TOML: {error}") from None
    return _with_absolute_paths(table, path.parent)


def _with_base_in_place(profile: Profile) -> Profile:
    """With the path of a base's folder made absolute: a run may go on from elsewhere, and else it is a hub's name."""
    if not isinstance(profile, LoRAProfile):
        return profile
    name = profile.model.init_from
    if name is None or not Path(name).is_dir():
        return profile
    model = profile.model.model_copy(update={"init_from": str(Path(name).resolve())})
    return profile.model_copy(update={"model": model})


_ALTERNATIVES = {
    "train": ("steps", "epochs", "tokens"),
    "data": ("builtin", "files", "dataset"),
    "model": ("builtin", "init_from"),
}


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`base` with the values of `over`; neither is changed."""
    merged = dict(base)
    for key, value in over.items():
        inner = merged.get(key)
        if isinstance(value, dict) and isinstance(inner, dict):
            alternatives = _ALTERNATIVES.get(key, ())
            if not value.keys().isdisjoint(alternatives):
                inner = {name: old for name, old in inner.items() if name not in alternatives}
            merged[key] = _merge(inner, value)
        else:
            merged[key] = value
    return merged


def _parse_override(override: str) -> dict[str, Any]:
    """`train.steps=50` as a table; the value is TOML, or a plain string where it is not valid TOML."""
    key, separator, text = override.partition("=")
    *sections, name = (part.strip() for part in key.split("."))
    if not separator or not all([*sections, name]):
        raise UserError(f"--set {override}: give it as KEY=VALUE, for example train.steps=50")
    table: dict[str, Any] = {name: _parse_value(text.strip())}
    for section in reversed(sections):
        table = {section: table}
    return _with_absolute_paths(table, Path.cwd())


def _parse_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _with_absolute_paths(table: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The table with its file names made absolute; what is not a file name is left for the validation to refuse."""

    def absolute(name: Any) -> Any:
        return str((folder / Path(name).expanduser()).resolve()) if isinstance(name, str) else name

    resolved = dict(table)
    if isinstance(data := table.get("data"), dict):
        resolved["data"] = data = dict(data)
        for key in ("files", "heldout_files", "chat_template"):
            if key in data:
                data[key] = (
                    [absolute(name) for name in data[key]] if isinstance(data[key], list) else absolute(data[key])
                )
        if data.get("tokenizer", "bpe") != "bpe":
            data["tokenizer"] = absolute(data["tokenizer"])
    for section in ("model", "adapter"):
        content = table.get(section)
        if isinstance(content, dict) and str(content.get("init_from", "")).startswith((".", "~")):
            resolved[section] = {**content, "init_from": absolute(content["init_from"])}  # else it may name a run
    return resolved


_ALIKE = 0.6


def _nearest(name: str, known: Iterable[str]) -> str:
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=_ALIKE)
    return f"did you mean {close[0]!r}?" if close else f"known are {', '.join(names)}"


def _describe(problem: ErrorDetails, kind: type[Profile]) -> str:
    location = problem["loc"]
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).removeprefix(".")
    if problem["type"] == "extra_forbidden":
        return f"{key or repr(key)} is not known; {_nearest_key(location, kind)}"
    if problem["type"] == "missing":
        return f"{key} is missing"
    value = problem["input"]
    shown = "" if isinstance(value, dict | BaseModel) else f" = {_as_toml(value)}"
    return f"{key}{shown}: {_in_words(problem)}"


_KINDS_OF_VALUE = {
    "model_type": "a table",
    "model_attributes_type": "a table",
    "list_type": "a list",
    "string_type": "a string",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
}


def _in_words(problem: ErrorDetails) -> str:
    if problem["type"] in _KINDS_OF_VALUE:
        return f"should be {_KINDS_OF_VALUE[problem['type']]}"
    return problem["msg"].removeprefix("Value error, ").replace("Input should be", "should be")


def _as_toml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value)


def _nearest_key(location: tuple[int | str, ...], kind: type[Profile]) -> str:
    """Where an unknown key probably belongs: the same name in another table, or a name beside it that is like it."""
    name, siblings = str(location[-1]), _names_at(location[:-1], kind)
    for table in _tables((), kind):
        if name in _names_at(table, kind):
            return f"did you mean '{'.'.join([*table, name])}'?"
    return _nearest(name, siblings)


def _tables(above: tuple[str, ...], kind: type[Profile]) -> Iterator[tuple[str, ...]]:
    """All tables of a profile, outer ones first: ("guard",), ("guard", "memory") …"""
    for name in _names_at(above, kind):
        if _names_at((*above, name), kind):
            yield (*above, name)
            yield from _tables((*above, name), kind)


def _names_at(location: tuple[int | str, ...], kind: type[Profile]) -> list[str]:
    """The keys of a table; none where the location is a value."""
    model: Any = kind
    for part in location:
        fields = {field.alias or name: field for name, field in model.model_fields.items()}
        model = fields[str(part)].annotation
    return [field.alias or name for name, field in getattr(model, "model_fields", {}).items()]
