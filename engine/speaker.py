"""A saved model that continues a text, outside of any training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from engine.checkpoint import choose_checkpoint
from engine.commands import Generate
from engine.runs import find_run
from engine.tasks.retention_lm import load_speaker, speak


def continue_text(
    runs_folder: Path, run: str, checkpoint: str, ask: Generate, report: Callable[[str], None]
) -> Iterator[str]:
    """Pieces of text that follow `ask.prompt`, from a run's checkpoint; damaged ones that `latest` passes over are
    reported. Raises `UserError` where there is none."""
    folder = choose_checkpoint(find_run(runs_folder, run), checkpoint, report, to_read=True).path
    model, tokenizer = load_speaker(folder)
    return (piece for piece in speak(model, tokenizer, ask) if piece)
