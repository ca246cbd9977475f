"""Whatever stands in a profile: it is valid, or one line says what is wrong and where."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from engine.errors import UserError
from engine.profile import Profile
from engine.profile_files import load_profile, validate_profile

GOOD: dict[str, Any] = {"kind": "retention-lm", "data": {"builtin": "python-docs"}, "train": {"steps": 10}}

ODD_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["07:00", "25:00", "pause", "bpe", "demo", "", "\x00", "a\nb", "~", "nan"])
    | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


def keys(model: type[BaseModel], above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, field in model.model_fields.items():
        path = (*above, field.alias or name)
        yield path
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from keys(field.annotation, path)


PATHS = st.sampled_from(sorted(keys(Profile))) | st.lists(st.text(max_size=8), min_size=1, max_size=3).map(tuple)


def put(table: dict[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    first, *rest = path
    inner = table.get(first)
    below = put(inner if isinstance(inner, dict) else {}, tuple(rest), value) if rest else value
    return {**table, first: below}


def judged(table: Any) -> None:
    try:
        profile = validate_profile(table, where="fuzz.toml")
    except UserError as error:
        said = str(error)
        assert said.startswith("fuzz.toml: ") and len(said.splitlines()) == 1 and len(said) < 2000, said
    else:
        assert validate_profile(profile.model_dump(mode="json", by_alias=True), "again") == profile


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(PATHS, ODD_VALUES), min_size=1, max_size=4))
def test_odd_values_in_any_place(changes: list[tuple[tuple[str, ...], Any]]) -> None:
    table = GOOD
    for path, value in changes:
        table = put(table, path, value)
    judged(table)


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.text(max_size=8), ODD_VALUES, max_size=4))
def test_any_table(table: dict[str, Any]) -> None:
    judged(table)


TOML = (
    'kind = "retention-lm"\n[data]\nbuiltin = "python-docs"\nfiles = ["~/a.txt"]\n[train]\nsteps = 10\n'
    '[guard]\nstop_at = "07:00"\n[guard.memory]\non_red = "stop"\n'
)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode), st.integers(0, len(TOML)), st.integers(0, 20))
def test_any_file(noise: bytes, position: int, dropped: int) -> None:
    """A good profile with something cut out and something put in."""
    good = TOML.encode()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "fuzz.toml"
        path.write_bytes(good[:position] + noise + good[position + dropped :])
        try:
            load_profile(str(path))
        except UserError as error:
            assert "fuzz.toml" in str(error) and len(str(error).splitlines()) == 1, str(error)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=40) | st.tuples(PATHS, st.text(max_size=20)).map(lambda pair: f"{'.'.join(pair[0])}={pair[1]}"))
def test_any_override(override: str) -> None:
    try:
        load_profile("demo", [override])
    except UserError as error:
        assert len(str(error).splitlines()) == 1, str(error)
