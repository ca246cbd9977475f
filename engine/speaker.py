"""A saved model that continues a text or answers, outside of any training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from engine.backend import compute_dtype
from engine.checkpoint import choose_checkpoint
from engine.commands import Generate
from engine.runs import find_run
from engine.tuned import find_tuned, load_tuned, model_folder


def continue_text(
    runs_folder: Path, name: str, checkpoint: str, ask: Generate, report: Callable[[str], None]
) -> Iterator[str]:
    """Pieces of text that follow `ask.prompt`, from a run's checkpoint, or from the folder of any adapter or model.

    What is loaded, and damaged checkpoints that `latest` passes over, are reported. Raises `UserError` where there is
    none.
    """
    tuned = find_tuned(runs_folder, name, checkpoint, report)
    if tuned is not None:
        from engine.models.cached import speak as answer

        base = load_tuned(tuned, compute_dtype("auto"), report)
        return (piece for piece in answer(base.model, base.tokenizer, ask) if piece)
    from engine.tasks.retention_lm import load_speaker, speak

    folder = model_folder(runs_folder, name)
    if folder is None:
        folder = choose_checkpoint(find_run(runs_folder, name), checkpoint, report, to_read=True).path
    model, tokenizer = load_speaker(folder)
    return (piece for piece in speak(model, tokenizer, ask) if piece)
