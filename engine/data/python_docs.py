"""Text that every Python carries: the language reference of `pydoc_data`, and the standard library's docstrings."""

from __future__ import annotations

import ast
import hashlib
import importlib
import os
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from engine.errors import UserError

HELDOUT_SHARE = 0.1
LONGEST_SHARED = 40
"""Characters in a row, spaces counted once, from which on a training passage counts as held-out text."""

_SKIPPED_FOLDERS = frozenset(
    ["test", "tests", "idlelib", "lib2to3", "pydoc_data", "turtledemo", "site-packages", "dist-packages", "__pycache__"]
)
_RULED_LINE = re.compile(r"[^\w\s]{4,}")  # every table shares those
_FORMAT = 1
"""Raise it when the text that comes out of the same Python changes."""


def fingerprint() -> str:
    """Names the text without extracting it: by the Python build, its standard library and the topics."""
    digest = hashlib.sha256(f"python-docs {_FORMAT}\0{sys.version}\0{sysconfig.get_path('stdlib')}".encode())
    for key, text in sorted(_topics().items()):
        digest.update(f"\0{key}\0{text}".encode())
    return digest.hexdigest()


def python_docs() -> tuple[list[str], list[str]]:
    """Training and held-out documents, in a fixed order.

    Held out are whole topics: the last ones in sorted key order, as many as come nearest to a tenth of the characters.
    Training text is the other topics, and for each module its docstrings, each text once. Topics quote one another, so
    a training paragraph that shares `LONGEST_SHARED` characters with held-out text is dropped. Where a Python carries
    no library source, the topics alone remain. Raises `UserError` where it carries no topics.
    """
    topics = _topics()
    keys = sorted(topics)
    heldout_keys = keys[_first_heldout([len(topics[key]) for key in keys]) :]
    heldout = [topics[key] for key in heldout_keys]
    shared = {window for text in heldout for window in _windows(text)}
    training = [topics[key] for key in keys if key not in heldout_keys]
    training += _docstring_documents(Path(sysconfig.get_path("stdlib")))
    cleaned = dict.fromkeys(_without(shared, text) for text in training)
    return [text for text in cleaned if text.strip()], heldout


def _topics() -> dict[str, str]:
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        raise UserError(
            'data.builtin = "python-docs": this Python carries no pydoc_data.topics; use data.files instead'
        ) from None
    return topics


def _first_heldout(sizes: list[int]) -> int:
    target = HELDOUT_SHARE * sum(sizes)
    tails = [sum(sizes[index:]) for index in range(1, len(sizes))]
    return 1 + min(range(len(tails)), key=lambda index: abs(tails[index] - target))


def _docstring_documents(library: Path) -> Iterator[str]:
    """One document a module: its docstrings in the order of the source; a docstring seen before is left out."""
    seen: set[str] = set()
    for path in _modules(library):
        fresh = [text for text in _docstrings(path) if text not in seen]
        seen.update(fresh)
        if fresh:
            yield "\n\n".join(dict.fromkeys(fresh)) + "\n"


def _modules(library: Path) -> Iterator[Path]:
    for parent, folders, files in os.walk(library):
        folders[:] = sorted(set(folders) - _SKIPPED_FOLDERS)
        yield from (Path(parent, name) for name in sorted(files) if name.endswith(".py"))


def _docstrings(path: Path) -> list[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old modules would be printed on the screen
            tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return []  # a template or a test file of the library that is not meant to be parsed
    return list(_docstrings_under(tree))


def _docstrings_under(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = ast.get_docstring(node)
        if text and _encodes(text):
            yield text
    for child in getattr(node, "body", ()):
        if isinstance(child, ast.stmt):
            yield from _docstrings_under(child)


def _encodes(text: str) -> bool:
    """False for a lone surrogate, which an escape in a docstring can spell."""
    return not re.search("[\ud800-\udfff]", text)


def _windows(text: str) -> Iterator[str]:
    for paragraph in _paragraphs(text):
        plain = " ".join(_RULED_LINE.sub(" ", paragraph).split())
        for start in range(len(plain) - LONGEST_SHARED + 1):
            yield plain[start : start + LONGEST_SHARED]


def _without(shared: set[str], text: str) -> str:
    kept = [paragraph for paragraph in _paragraphs(text) if shared.isdisjoint(_windows(paragraph))]
    return "\n\n".join(kept)


def _paragraphs(text: str) -> list[str]:
    return re.split(r"\n[ \t]*\n", text)
