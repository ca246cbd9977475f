"""What a run does to its machine, in one line: memory against its limit, pressure, power and heat. Unknown is `–`."""

from __future__ import annotations

from textual.content import Content

from engine.events import Level, Reading
from retention_tui import wording
from retention_tui.progress import Progress
from retention_tui.theme import FAINT

_COLOURS = {Level.GREEN: "$success", Level.YELLOW: "$warning", Level.RED: "$error"}
_LEVELS = {Level.GREEN: "normal", Level.YELLOW: "warning", Level.RED: "critical"}
_HEAT = {
    "nominal": ("cool", FAINT),
    "fair": ("warm", FAINT),
    "serious": ("hot", "$warning"),
    "critical": ("too hot", "$error"),
}
_BAR_WIDTH = 20
_SWAP_SHOWN_BYTES = 1e8
_GAP = Content("   ")


def machine_line(progress: Progress, width: int) -> Content:
    """All that is known, or as much of it as there is room for; what matters most is kept longest."""
    metrics, reading = progress.metrics, _current(progress)
    process = metrics.get("process_memory_bytes")
    numbers = [
        ("active", metrics.get("active_memory_bytes")),
        ("peak", metrics.get("peak_memory_bytes")),
        ("cache", metrics.get("cache_memory_bytes")),
        ("process", process),
    ]
    memory = [Content.assemble(("memory ", FAINT), *_number(*numbers[0]))]
    memory += [Content.assemble(*_number(*number)) for number in numbers[1:]]
    bar = _bar(process, reading, _BAR_WIDTH)
    states = [pressure(reading), *_swap(reading), *_gpu(reading), *_power(reading), *_heat(reading), *_lid(reading)]
    for kept in (4, 2, 1):
        line = _GAP.join([Content("  ").join(memory[:kept]), bar, *states])
        if line.cell_length <= width:
            return line
    while len(states) > 1 and _GAP.join([memory[0], bar, *states]).cell_length > width:
        states.pop()
    return _GAP.join([memory[0], bar, *states])


def pressure(reading: Reading | None, *, with_cause: bool = True) -> Content:
    """`pressure ● normal`, or its level with what makes it so."""
    level = reading.level if reading is not None else None
    if reading is None or level is None:
        return Content.styled(f"pressure {wording.MISSING}", FAINT)
    said = Content.assemble(("pressure ", FAINT), (f"● {_LEVELS[level]}", _COLOURS[level]))
    if with_cause and reading.cause and level is not Level.GREEN:
        said += Content.styled(f": {wording.printable(' '.join(reading.cause.split()))}", FAINT)
    return said


def memory_in_short(progress: Progress) -> Content:
    """The process's memory of what it may use, and the colour of the pressure: `2.02 of 8.0 GB ●`."""
    reading = _current(progress)
    process = progress.metrics.get("process_memory_bytes")
    limit = reading.limit_bytes if reading is not None else None
    of = f" of {wording.number(limit / 1e9, 1)} GB" if limit is not None else " GB"
    level = reading.level if reading is not None else None
    dot = ("●", _COLOURS[level]) if level is not None else (wording.MISSING, FAINT)
    return Content.assemble((_gigabytes(process), "bold"), (of, FAINT), " ", dot)


def _current(progress: Progress) -> Reading | None:
    """The newest reading while it is of now: nobody looks any more once the run is over."""
    return None if progress.over else progress.reading


def _number(name: str, count: float | None) -> tuple[tuple[str, str], tuple[str, str]]:
    return (f"{_gigabytes(count):>5}", "bold"), (f" {name}", FAINT)


def _gigabytes(count: float | None) -> str:
    return wording.number(None if count is None else count / 1e9, 2 if count is None or count >= 1e8 else 3)


def _bar(process: float | None, reading: Reading | None, width: int) -> Content:
    """The limit's length: what the process has, what others have, and what is left."""
    limit = reading.limit_bytes if reading is not None else None
    if reading is None or not limit:
        return Content.styled("┊" * width + f"▏ {wording.MISSING:<4} GB", "$foreground 25%")
    mine = min(1.0, (process or 0.0) / limit)
    used = mine if reading.available_bytes is None else max(mine, 1 - max(0, reading.available_bytes) / limit)
    halves, cells = round(mine * width * 2), min(width, round(used * width))
    own = "█" * (halves // 2) + ("▌" if halves % 2 else "")
    others = "█" * max(0, cells - len(own))
    level = reading.level
    colour = _COLOURS[level] if level in (Level.YELLOW, Level.RED) else "$foreground 75%"
    return Content.assemble(
        (own, colour),
        (others, "$foreground 30%"),
        ("┊" * (width - len(own) - len(others)) + "▏", "$foreground 25%"),
        (f" {wording.number(limit / 1e9, 1)} GB", "bold"),
    )


def _swap(reading: Reading | None) -> list[Content]:
    if reading is None or reading.swap_bytes is None or reading.swap_bytes < _SWAP_SHOWN_BYTES:
        return []
    return [Content.assemble(("swap ", FAINT), wording.size(reading.swap_bytes))]


def _gpu(reading: Reading | None) -> list[Content]:
    if reading is None or reading.gpu_bytes is None:
        return []
    of = f" of {wording.number(reading.gpu_limit_bytes / 1e9, 1)}" if reading.gpu_limit_bytes else ""
    return [Content.assemble(("GPU ", FAINT), (_gigabytes(reading.gpu_bytes), "bold"), (f"{of} GB", FAINT))]


def _power(reading: Reading | None) -> list[Content]:
    if reading is None or reading.on_mains is None:
        return [Content.styled(f"power {wording.MISSING}", FAINT)]
    if reading.on_mains:
        return [Content.styled("mains", FAINT)]
    left = f" {reading.battery_percent:.0f} %" if reading.battery_percent is not None else ""
    return [Content.styled(f"battery{left}", "$warning")]


def _heat(reading: Reading | None) -> list[Content]:
    said = _HEAT.get(reading.heat) if reading is not None and reading.heat is not None else None
    return [Content.styled(*said) if said else Content.styled(f"heat {wording.MISSING}", FAINT)]


def _lid(reading: Reading | None) -> list[Content]:
    return [Content.styled("lid closed", "$warning")] if reading is not None and reading.lid_closed else []
