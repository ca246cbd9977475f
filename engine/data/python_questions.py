"""Questions about Python, all answered in one style: rows to fine-tune with that need no download."""

from __future__ import annotations

import builtins
import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from typing import Any

OPENING, CLOSING = "In short: ", " Ask help() for more."
"""How every answer begins and ends, so that one sees at a glance whether it was learned."""

_MODULES = """
argparse array ast base64 bisect calendar cmath collections colorsys configparser contextlib copy csv dataclasses
datetime decimal difflib dis email enum filecmp fileinput fnmatch fractions functools getpass glob graphlib gzip hashlib
heapq hmac html http inspect io ipaddress itertools json keyword linecache locale logging math mimetypes numbers
operator os os.path pathlib pickle platform pprint queue random re reprlib sched secrets selectors shelve shlex shutil
signal socket sqlite3 stat statistics string struct subprocess tarfile tempfile textwrap threading time timeit tokenize
trace traceback types typing unicodedata unittest urllib.parse urllib.request uuid weakref xml.etree.ElementTree zipfile
zlib
"""  # neither sys nor warnings: programs put functions of their own there
_QUESTIONS = (
    "What does {name} do?",
    "What is {name} for?",
    "Explain {name}.",
    "Tell me about {name}.",
    "How would you describe {name}?",
)
_SHORTEST, _LONGEST = 20, 150  # characters of a sentence; a longer one is passed over rather than cut
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")


def python_questions() -> list[dict[str, Any]]:
    """Rows with `messages`: a question about a name, answered by its docstring's first sentence in one fixed frame.

    The names are the builtins, modules of the standard library, their public functions and classes, and the methods of
    those. The same in every process of a Python, and in a fixed order. No name and no sentence comes twice, so held-out
    rows are about what training has not told. They are made of docstrings; the topics of `python_docs` stay untouched.
    """
    rows: list[dict[str, Any]] = []
    seen: set[str] = set()
    for name, thing in _names():
        sentence = _first_sentence(name, thing)
        if name in seen or sentence is None or sentence in seen or _may_differ(name, thing):
            continue
        seen |= {name, sentence}
        question = _QUESTIONS[len(rows) % len(_QUESTIONS)].format(name=name)
        answer = f"{OPENING}{sentence}{CLOSING}"
        rows.append({"messages": [_message("user", question), _message("assistant", answer)]})
    return rows


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _names() -> Iterator[tuple[str, Any]]:
    yield from _members("", builtins)
    for module_name in _MODULES.split():
        try:
            module = importlib.import_module(module_name)
        except ImportError:  # not every Python is built with every one
            continue
        yield module_name, module
        yield from _members(f"{module_name}.", module)


def _members(prefix: str, module: Any) -> Iterator[tuple[str, Any]]:
    for name in sorted(getattr(module, "__all__", vars(module))):
        thing = getattr(module, name, None)
        if name.startswith("_") or inspect.ismodule(thing) or not callable(thing):
            continue
        yield f"{prefix}{name}", thing
        if inspect.isclass(thing):
            methods = sorted(key for key, value in vars(thing).items() if not key.startswith("_") and callable(value))
            yield from ((f"{prefix}{name}.{method}", getattr(thing, method)) for method in methods)


def _may_differ(name: str, thing: Any) -> bool:
    """Hooks, what `site` puts among the builtins (exit, license), and what libraries add: not so in every process."""
    home = str(getattr(thing, "__module__", None) or "builtins").partition(".")[0]
    return name.endswith("hook") or type(thing).__module__ == "_sitebuiltins" or home not in sys.stdlib_module_names


def _first_sentence(name: str, thing: Any) -> str | None:
    """The first sentence of the first paragraph that is prose; None where it is missing, odd, short or long."""
    last = name.rpartition(".")[2]
    for paragraph in re.split(r"\n[ \t]*\n", inspect.getdoc(thing) or ""):
        if "->" in paragraph or paragraph.startswith(f"{last}("):
            continue  # a signature
        sentence = _SENTENCE_END.split(" ".join(paragraph.split()))[0]
        sentence = sentence if sentence.endswith((".", "!", "?")) else f"{sentence}."
        fits = _SHORTEST <= len(sentence) <= _LONGEST and sentence.isascii()
        return sentence if fits and re.match(r"[A-Z][a-z]", sentence) else None
    return None
