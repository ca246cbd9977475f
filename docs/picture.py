"""Makes the picture in README.md, docs/screen.svg, from the real app and engine: `python docs/picture.py [STEPS]`.

Trains the first steps of the demo in a temporary folder, a minute or two on an idle machine.
"""

from __future__ import annotations

import asyncio
import html
import os
import re
import sys
import tempfile
from pathlib import Path

PICTURE = Path(__file__).with_name("screen.svg")
SIZE = (130, 40)
STEPS = 230
TEXT = re.compile(r'<text class="([^"]+)" x="([\d.]+)" y="([\d.]+)" textLength="([\d.]+)"([^>]*)>([^<]*)</text>')
SPACE = "&#160;"


async def take_picture(runs_folder: Path, steps: int) -> str:
    """Trains for `steps` and returns what the screen shows then, as SVG."""
    from retention_tui.app import RetentionApp
    from retention_tui.session import Session

    session = Session(runs_folder)
    client = session.start("demo", ["validate.every=40", "checkpoint.every=80"])
    app = RetentionApp(session, client)
    try:
        async with app.run_test(size=SIZE):
            while client.alive and (client.run.last("loss") or (0, 0.0))[0] < steps:
                await asyncio.sleep(0.5)
            await asyncio.sleep(1.5)  # a round of charts
            return app.export_screenshot(title="retention-tui run demo")
    finally:
        session.stop("the picture is taken")
        session.finish()


def slim(svg: str) -> str:
    """The picture without its link to a web font, which a README may not load anyway, and with shorter coordinates."""
    svg = re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL)
    svg = svg.replace("Fira Code", "ui-monospace, SFMono-Regular, Menlo, Consolas, DejaVu Sans Mono")
    svg = TEXT.sub(without_outer_spaces, svg)
    svg = re.sub(r'="(\d+\.\d)\d+"', r'="\1"', svg)
    return re.sub(r"\n\s*\n+", "\n", svg)


def without_outer_spaces(match: re.Match[str]) -> str:
    """A piece of text that begins where its first character is: some renderers drop the spaces before it."""
    style, x, y, length, rest, text = match.groups()
    inner = text.removesuffix("\n")
    cells = len(html.unescape(inner))
    if not inner.replace(SPACE, ""):
        return ""
    width = float(length) / cells
    before = (len(inner) - len(re.sub(f"^(?:{SPACE})+", "", inner))) // len(SPACE)
    inner = re.sub(f"^(?:{SPACE})+|(?:{SPACE})+$", "", inner)
    length = f"{width * len(html.unescape(inner)):.1f}"
    return (
        f'<text class="{style}" x="{float(x) + before * width:.1f}" y="{y}" textLength="{length}"{rest}>{inner}</text>'
    )


def main() -> int:
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else STEPS
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("RETENTION_TUI_CACHE", str(Path(folder) / "cache"))
        picture = slim(asyncio.run(take_picture(Path(folder) / "runs", steps)))
    PICTURE.write_text(picture, encoding="utf-8")
    sys.stdout.write(f"{PICTURE}: {len(picture) / 1e3:.0f} kB\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
