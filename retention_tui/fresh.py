"""Our command in a fresh process: never a fork of this one, whose threads and MLX would not survive that."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def fresh_process(arguments: Sequence[str], module: str = "retention_tui") -> list[str]:
    """The words that start it, with what Python would import from the present folder left out (-P)."""
    return [sys.executable, "-P", "-m", module, *arguments]
