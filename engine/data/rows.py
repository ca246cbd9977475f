"""Rows to learn from, as they lie in files, in a data set of the hub, or in what is built in."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import UserError
from engine.loading import Loading
from engine.profile_lora import ChatData

SUFFIXES = (".jsonl", ".parquet")
_TRAIN, _HELDOUT = ("train",), ("valid", "validation")
_READ_AT_ONCE = 1024


@dataclass(frozen=True)
class Row:
    """What a row holds, and where it came from: `FILE: line N` or `FILE: row N`, both counted from 1."""

    values: dict[str, Any]
    origin: str


@dataclass(frozen=True)
class Rows:
    """`heldout` is None where held-out rows have to be taken from among the others."""

    train: list[Row]
    heldout: list[Row] | None


def read_rows(data: ChatData, keys: Collection[str], loading: Loading) -> Rows:
    """All rows of a profile whose paths are absolute. Nothing that was downloaded is executed.

    Of Parquet only the columns `keys` are read, where it has any of them. Raises `UserError` for a source that is
    missing, empty or damaged, with file and line.
    """
    if data.builtin is not None:
        from engine.data.python_questions import python_questions

        rows = [Row(values, f"data.builtin: row {number}") for number, values in enumerate(python_questions(), start=1)]
        heldout = None
    elif data.dataset is not None:
        rows = _of_dataset(data, data.split, keys, loading)
        heldout = _of_dataset(data, data.heldout_split, keys, loading) if data.heldout_split else None
    else:
        rows = _of_files(_expand(data.files, "data.files", _TRAIN), "data.files", keys, loading)
        beside = [file for name in data.files if Path(name).is_dir() for file in _in_folder(Path(name), _HELDOUT)]
        heldout = _of_files(beside, "data.files", keys, loading) if beside and not data.heldout_files else None
    if data.heldout_files:
        files = _heldout_files(data, _expand(data.files, "data.files", _TRAIN))
        heldout = _of_files(files, "data.heldout_files", keys, loading)
    return Rows(rows, heldout)


def check_sources(data: ChatData) -> None:
    """Raises `UserError` where a file of the user's own is missing, before anything is downloaded."""
    files = _expand(data.files, "data.files", _TRAIN)
    _heldout_files(data, files)


def _heldout_files(data: ChatData, files: list[Path]) -> list[Path]:
    heldout = _expand(data.heldout_files, "data.heldout_files", _HELDOUT)
    if both := {*heldout} & {*files}:
        raise UserError(f"data.heldout_files: {min(both)} is in data.files too; leave it out of one of them")
    return heldout


def _of_dataset(data: ChatData, split: str, keys: Collection[str], loading: Loading) -> list[Row]:
    from engine.hub import fetch_dataset

    files = fetch_dataset(str(data.dataset), data.dataset_config, split, loading)
    return _of_files(files, "data.dataset", keys, loading, within=f"{data.dataset}/")


def _of_files(
    files: list[Path], key: str, keys: Collection[str], loading: Loading, within: str | None = None
) -> list[Row]:
    """`within` stands for the folder, where that is a place in a cache which says nothing."""
    rows: list[Row] = []
    for path in files:
        before = len(rows)
        name = str(path) if within is None else within + path.name
        read = _of_parquet(path, name, keys) if path.suffix.lower() == ".parquet" else _of_jsonl(path, name)
        for row in read:
            rows.append(row)
            if len(rows) % _READ_AT_ONCE == 0:
                loading.progress("reading rows", len(rows), None, "rows")
        if len(rows) == before:
            raise UserError(f"{key}: {name}: no row in it; give a file with rows")
    return rows


def _expand(names: list[str], key: str, stems: tuple[str, ...]) -> list[Path]:
    files: list[Path] = []
    for name in names:
        path = Path(name)
        if path.is_dir():
            found = _in_folder(path, stems)
            if not found:
                wanted = " or ".join(f"{stems[0]}{suffix}" for suffix in SUFFIXES)
                raise UserError(f"{key}: {path}: the folder has no {wanted}")
            files += found
        elif not path.exists():
            raise UserError(f"{key}: {path}: no such file or folder")
        elif path.suffix.lower() not in SUFFIXES or not path.is_file():
            raise UserError(f"{key}: {path}: should be a {' or '.join(SUFFIXES)} file, or a folder with some")
        else:
            files.append(path)
    return list(dict.fromkeys(files))


def _in_folder(folder: Path, stems: tuple[str, ...]) -> list[Path]:
    """`train.jsonl` as mlx-lm has it, `train.parquet`, or the hub's parts `train-00000-of-00002.parquet`."""
    for stem in stems:
        for suffix in SUFFIXES:
            if (path := folder / f"{stem}{suffix}").is_file():
                return [path]
        if parts := sorted(folder.glob(f"{stem}-*-of-*.parquet")):
            return parts
    return []


def _of_jsonl(path: Path, name: str) -> Iterator[Row]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                origin = f"{name}: line {number}"
                text = _decoded(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line, origin)
                if text.strip():
                    yield Row(_parsed(text, origin), origin)
    except OSError as error:
        raise UserError(f"{name}: {error.strerror or error}") from None


def _decoded(line: bytes, origin: str) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError:
        raise UserError(f"{origin}: not UTF-8 text; convert the file to UTF-8") from None


def _parsed(text: str, origin: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{origin}: not valid JSON ({what_is_wrong(error)}); each line is an object like {{…}}"
        ) from None
    if not isinstance(values, dict):
        raise UserError(f"{origin}: a row is an object like {{…}}, not {type(values).__name__}")
    if "\\u" in text:  # JSON can spell characters that there are none of
        try:
            json.dumps(values, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise UserError(f"{origin}: holds half of a surrogate pair, which is not a character") from None
    return values


def what_is_wrong(error: Exception) -> str:
    """Of text that is one line of a file: the line of the file is said already."""
    return f"{error.msg}, character {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else str(error)


def _of_parquet(path: Path, name: str, keys: Collection[str]) -> Iterator[Row]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            columns = [column for column in file.schema_arrow.names if column in keys] or None
            number = 0
            for batch in file.iter_batches(batch_size=_READ_AT_ONCE, columns=columns):
                for values in batch.to_pylist():
                    number += 1
                    filled = {key: _without_nulls(value) for key, value in values.items()}
                    yield Row(filled, f"{name}: row {number}")
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{name}: cannot be read as Parquet ({reason}); is it whole?") from None


def _without_nulls(value: Any) -> Any:
    """A column of structs gives every struct all fields of any; those that a row has not are null."""
    if isinstance(value, dict):
        return {key: _without_nulls(entry) for key, entry in value.items() if entry is not None}
    if isinstance(value, list):
        return [_without_nulls(entry) for entry in value]
    return value
