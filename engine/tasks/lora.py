"""Fine-tuning of a pretrained language model: LoRA, DoRA, or all of its weights."""

from __future__ import annotations

from pathlib import Path

from engine.profile import LoRAProfile
from engine.tasks import Task


def LoRATask(profile: LoRAProfile, runs_folder: Path, checkpoint: Path | None = None) -> Task:
    raise NotImplementedError
