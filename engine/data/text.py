"""Text from files, folders and .jsonl, split into training and held-out text."""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine.data.python_docs import fingerprint as python_docs_fingerprint
from engine.data.python_docs import python_docs
from engine.errors import UserError
from engine.profile_retention import TextData

FOLDER_SUFFIXES = frozenset({".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".html", ".csv", ".py", ".jsonl"})
"""What is taken from a folder. A file that is named itself may have any suffix; .jsonl is rows, all else plain text."""


@dataclass(frozen=True)
class Corpus:
    """Documents: a document is a plain text file, or a row of a .jsonl file."""

    train: list[str]
    heldout: list[str]


def read_corpus(data: TextData, seed: int) -> Corpus:
    """Reads and splits the text of a profile whose paths are absolute.

    From a folder come all files below it with a suffix of `FOLDER_SUFFIXES`, in sorted order, without hidden ones
    and without empty ones. Raises `UserError` for text that is missing, empty, not UTF-8, or cannot be split as asked.
    """
    if data.builtin is not None:
        return Corpus(*python_docs())
    documents = _read_documents(data.files, "data.files")
    if data.heldout_files:
        both = {*_expand(data.files, "data.files")} & {*_expand(data.heldout_files, "data.heldout_files")}
        if both:
            raise UserError(f"data.heldout_files: {min(both)} is in data.files too; leave it out of one of them")
        return Corpus(documents, _read_documents(data.heldout_files, "data.heldout_files"))
    if data.split == "tail" or len(set(documents)) == 1:
        return _split_tail(documents, data.heldout_fraction)
    return _split_documents(documents, data.heldout_fraction, seed)


def source_digest(data: TextData, seed: int) -> str:
    """Names what `read_corpus` returns, by the contents of the sources and by how they are split, without parsing."""
    if data.builtin is not None:
        return python_docs_fingerprint()
    digest = hashlib.sha256()
    for names, key in ((data.files, "data.files"), (data.heldout_files, "data.heldout_files")):
        digest.update(f"{key}\0".encode())
        for path in _expand(names, key):
            content = _read_bytes(path, key)
            digest.update(f"{path.suffix == '.jsonl'} {len(content)}\0".encode())
            digest.update(content)
    split = "files" if data.heldout_files else f"{data.split} {data.heldout_fraction!r}"
    digest.update(f"{split} {seed if split.startswith('document') else ''}".encode())
    return digest.hexdigest()


def gzip_bits_per_byte(texts: Iterable[str]) -> float:
    """What `gzip -9` needs for the texts joined by line breaks, in bits per UTF-8 byte of the texts themselves."""
    encoded = [text.encode() for text in texts]
    compressed = gzip.compress(b"\n".join(encoded), compresslevel=9, mtime=0)
    return 8 * len(compressed) / sum(map(len, encoded))


def _split_documents(documents: Sequence[str], fraction: float, seed: int) -> Corpus:
    copies = Counter(documents)
    distinct = list(copies)  # equal documents must fall on the same side
    sizes = [len(text) * count for text, count in copies.items()]
    target = fraction * sum(sizes)
    chosen: list[int] = []
    held = 0
    for index in np.random.default_rng(seed).permutation(len(distinct)).tolist():
        if held + sizes[index] / 2 <= target and len(chosen) < len(distinct) - 1:
            chosen.append(index)
            held += sizes[index]
    if not chosen:
        chosen = [min(range(len(distinct)), key=sizes.__getitem__)]
    heldout = {distinct[index] for index in chosen}
    return Corpus([text for text in documents if text not in heldout], [text for text in documents if text in heldout])


def _split_tail(documents: Sequence[str], fraction: float) -> Corpus:
    position = math.floor((1 - fraction) * sum(map(len, documents)))
    index = 0
    while position >= len(documents[index]):
        position -= len(documents[index])
        index += 1
    text = documents[index]
    cut = text.rfind("\n", 0, position) + 1 or text.find("\n", position) + 1
    if (cut == 0 and index == 0) or (cut == len(text) and index == len(documents) - 1):
        raise UserError("data.files: the text has no line break where its tail could be held out; give more text")
    train, heldout = [*documents[:index], text[:cut]], [text[cut:], *documents[index + 1 :]]
    corpus = Corpus([part for part in train if part.strip()], [part for part in heldout if part.strip()])
    if not corpus.train or not corpus.heldout:
        empty = "held-out" if corpus.train else "training"
        raise UserError(f"data.heldout_fraction = {fraction}: leaves no {empty} text; give more or change it")
    return corpus


def _read_documents(names: Iterable[str], key: str) -> list[str]:
    documents = [text for path in _expand(names, key) for text in _documents_of(path, key) if text.strip()]
    if not documents:
        raise UserError(f"{key}: {', '.join(names)}: no text in it; give UTF-8 text files, or .jsonl rows with a text")
    return documents


def _expand(names: Iterable[str], key: str) -> list[Path]:
    paths: list[Path] = []
    for name in names:
        path = Path(name)
        if path.is_dir():
            found = list(_files_below(path))
            if not found:
                suffixes = " ".join(sorted(FOLDER_SUFFIXES))
                raise UserError(f"{key}: {path}: the folder holds no text; files are taken that end in {suffixes}")
            paths += found
        elif not path.exists():
            raise UserError(f"{key}: {path}: no such file or folder")
        elif not path.is_file():
            raise UserError(f"{key}: {path}: not a file or folder")
        elif path.stat().st_size == 0:
            raise UserError(f"{key}: {path}: the file is empty; give one with text")
        else:
            paths.append(path)
    return list(dict.fromkeys(paths))


def _files_below(folder: Path) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            path = Path(parent, name)
            if not name.startswith(".") and path.suffix.lower() in FOLDER_SUFFIXES and path.stat().st_size:
                yield path


def _documents_of(path: Path, key: str) -> Iterator[str]:
    content = _read_bytes(path, key)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{key}: {path}: not UTF-8 text at line {line}; convert it to UTF-8 or leave it out") from None
    if "\0" in text:
        raise UserError(f"{key}: {path}: a binary file (it holds zero bytes); give UTF-8 text")
    if path.suffix.lower() == ".jsonl":
        yield from _rows(text, path, key)
    else:
        yield text


def _rows(text: str, path: Path, key: str) -> Iterator[str]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{key}: {path}: line {number}"
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise UserError(f'{where}: not valid JSON ({error}); a row is {{"text": "…"}}') from None
        if not isinstance(row, dict) or "text" not in row:
            raise UserError(f'{where}: has no key "text"; a row is {{"text": "…"}}')
        document = row["text"]
        if not isinstance(document, str):
            raise UserError(f'{where}: "text" is {type(document).__name__}, not a string')
        try:
            document.encode()
        except UnicodeEncodeError:
            raise UserError(f'{where}: "text" holds half of a surrogate pair, which is not a character') from None
        yield document


def _read_bytes(path: Path, key: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{key}: {path}: {error.strerror or error}") from None
