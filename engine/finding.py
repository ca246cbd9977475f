"""What the doctor says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """One thing looked at. `advice` says what to do, where something is to be done."""

    name: str
    value: str
    status: Literal["ok", "warning", "problem"] = "ok"
    advice: str = ""
