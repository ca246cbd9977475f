"""Makes the pictures in README.md from the real app and engine: `python docs/picture.py [screen] [chat]`.

docs/screen.svg is the demo on its run screen, a minute or two on an idle machine; docs/chat.svg the fine-tuning demo,
with base and adapter side by side: it pretrains the base first, unless $RETENTION_TUI_CACHE has it.
"""

from __future__ import annotations

import asyncio
import html
import os
import re
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
SIZE, CHAT_SIZE = (130, 40), (130, 30)
STEPS, CHAT_STEPS = 230, 120
QUESTION = "Tell me about str.upper."
TEXT = re.compile(r'<text class="([^"]+)" x="([\d.]+)" y="([\d.]+)" textLength="([\d.]+)"([^>]*)>([^<]*)</text>')
SPACE = "&#160;"


async def take_picture(name: str, runs_folder: Path) -> str:
    """Trains for some steps and returns what the screen shows then, as SVG."""
    from textual.widgets import Input

    from retention_tui.app import RetentionApp
    from retention_tui.session import Session

    session, chats = Session(runs_folder), name == "chat"
    profile = "lora-demo" if chats else "demo"
    longer = ["train.epochs=20"] if chats else []
    client = session.start(profile, ["validate.every=40", "checkpoint.every=80", *longer])
    app = RetentionApp(session, client)
    try:
        async with app.run_test(size=CHAT_SIZE if chats else SIZE) as pilot:
            while client.alive and (client.run.last("loss") or (0, 0.0))[0] < (CHAT_STEPS if chats else STEPS):
                await asyncio.sleep(0.5)
            if chats:
                await pilot.press("2")
                app.screen.query_one(Input).value = QUESTION
                await pilot.press("enter")
                await asyncio.sleep(8)
            await asyncio.sleep(1.5)  # a round of charts
            return app.export_screenshot(title=f"retention-tui run {profile}")
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
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("RETENTION_TUI_CACHE", f"{folder}/cache")
        for name in sys.argv[1:] or ["screen", "chat"]:
            picture = slim(asyncio.run(take_picture(name, Path(folder, name))))
            path = HERE / f"{name}.svg"
            path.write_text(picture, encoding="utf-8")
            sys.stdout.write(f"{path}: {len(picture) / 1e3:.0f} kB\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
