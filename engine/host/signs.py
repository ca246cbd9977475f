"""Signs of memory pressure, and how several make one level."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeVar

from engine.events import Level

_Value = TypeVar("_Value")

_YELLOW_SHARE, _YELLOW_BYTES = 0.10, 4e9
_RED_SHARE, _RED_BYTES = 0.05, 2e9


class Sign(NamedTuple):
    """What one sign says, and why, in words; the words of a green one are not shown."""

    level: Level
    cause: str = ""


def worst(signs: Iterable[Sign]) -> Sign | None:
    """The worst sign, the first of its like; None where there is none, because then the level is unknown."""
    return max(signs, key=lambda sign: list(Level).index(sign.level), default=None)


def room(name: str, limit_bytes: int, available_bytes: int) -> Sign:
    """What the room left under a limit says: yellow below a tenth of it, red below a twentieth.

    Of a large memory a share would be too careful: 10 % of 128 GB are more than a micro-batch of most runs, and who has
    paid for them wants to fill them. So 4 GB and 2 GB are enough anywhere; on 8 GB the lines are at 0.8 and 0.4.
    """
    used = f"{name} at {100 * (1 - available_bytes / max(1, limit_bytes)):.0f} % of {limit_bytes / 1e9:.1f} GB"
    if available_bytes <= min(_RED_SHARE * limit_bytes, _RED_BYTES):
        return Sign(Level.RED, used)
    if available_bytes <= min(_YELLOW_SHARE * limit_bytes, _YELLOW_BYTES):
        return Sign(Level.YELLOW, used)
    return Sign(Level.GREEN)


def known(look: Callable[[], _Value]) -> _Value | None:
    """What `look` finds; None where it fails, however it fails: an unknown sign must not take the others with it."""
    try:
        return look()
    except Exception:
        return None
