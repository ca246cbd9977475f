"""How numbers and times are said: in words and units, short, and of a steady width where they change."""

from __future__ import annotations

import math
import time

MISSING = "–"


_VISIBLE = {
    **{code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\n\t"},
    0x7F: "\u2421",
    **dict.fromkeys(range(0x80, 0xA0), "\ufffd"),
}


def printable(text: str) -> str:
    """Text that a terminal shows and does not obey: control characters become symbols; lines and tabs stay.

    A model may say anything, also what would clear the screen. ESC becomes `␛` and so on; C1 has no symbols: `\ufffd`.
    """
    return text.translate(_VISIBLE)


def number(value: float | None, decimals: int = 3) -> str:
    """A plain number: `2.684`; large ones lose decimals before they grow wider."""
    if value is None:
        return MISSING
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    if abs(value) >= 100_000:
        return f"{value:.1e}"
    digits = len(str(int(abs(value))))
    return f"{value:,.{max(0, decimals - digits + 1)}f}"


def scientific(value: float | None) -> str:
    """A learning rate: `2.10e-03`."""
    return MISSING if value is None else f"{value:.2e}" if math.isfinite(value) else number(value)


def thousands(value: float | None) -> str:
    """A count or a rate in three digits: `10.6 k`, `774 M`, `0.9 M`."""
    if value is None or not math.isfinite(value):
        return number(value)
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit * 0.8995:
            scaled = value / limit
            return f"{scaled:.1f} {unit}" if abs(scaled) < 99.95 else f"{scaled:,.0f} {unit}"
    return f"{value:.0f}" if abs(value) >= 99.95 or value == int(value) else f"{value:.1f}"


def size(count: float | None) -> str:
    """Bytes: `1.21 GB` (10⁹), or `38 MB` below a tenth of that."""
    if count is None or not math.isfinite(count):
        return number(count)
    if abs(count) >= 1e8:
        return f"{count / 1e9:.2f} GB" if abs(count) < 99.995e9 else f"{count / 1e9:.1f} GB"
    return f"{count / 1e6:.0f} MB" if abs(count) >= 1e6 else f"{count / 1e3:.0f} kB"


def duration(seconds: float | None) -> str:
    """`5 h 12 m`, `12 m 04 s`, `45 s`."""
    if seconds is None or not math.isfinite(seconds):
        return MISSING
    total = max(0, round(seconds))
    minutes, hours, days = total // 60, total // 3600, total // 86400
    if days:
        return f"{days} d {hours % 24:02d} h"
    if hours:
        return f"{hours} h {minutes % 60:02d} m"
    return f"{minutes} m {total % 60:02d} s" if minutes else f"{total} s"


def clock(moment: float, *, now: float | None = None, seconds: bool = False) -> str:
    """The time of day of a moment in seconds since the epoch; with the weekday where it is not within a day of now."""
    local = time.localtime(moment)
    text = time.strftime("%H:%M:%S" if seconds else "%H:%M", local)
    now = time.time() if now is None else now
    return text if abs(moment - now) < 86400 else f"{time.strftime('%a', local)} {text}"


def ago(moment: float, *, now: float | None = None) -> str:
    """How long ago a moment was: `just now`, `12 m ago`, `3 d ago`."""
    passed = (time.time() if now is None else now) - moment
    if passed < 60:
        return "just now"
    for limit, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if passed >= limit:
            return f"{int(passed // limit)} {unit} ago"
    return "just now"
