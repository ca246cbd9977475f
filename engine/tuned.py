"""A base with a trained adapter on it, outside of any training: of a run, or of a folder that anybody wrote."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from engine.backend import mx
from engine.checkpoint import choose_checkpoint
from engine.errors import UserError
from engine.events import Event
from engine.lines import LineWriter
from engine.loading import Loading
from engine.profile import LoRAProfile
from engine.profile_files import validate_profile
from engine.profile_lora import PretrainedModel
from engine.runs import find_run
from engine.store import RunDirectory

from mlx.utils import tree_map

if TYPE_CHECKING:
    from engine.models.pretrained import Base

Report = Callable[[str], None]


@dataclass(frozen=True)
class Tuned:
    """Where a tuned model is: its base, its adapter's folder, and the chat template that it was taught with.

    A model's folder, a fused one perhaps, is a base without an adapter.
    """

    model: PretrainedModel
    adapter: Path | None
    chat_template: str | None = None


def find_tuned(runs_folder: Path, name: str, checkpoint: str, report: Report) -> Tuned | None:
    """What a run has learned at a checkpoint (`latest`, `best` or a step), or the folder of an adapter or a model.

    None where a run of that name trains whole models, or the folder is of such a model. Raises `UserError` where there
    is nothing of that name.
    """
    bare = Path(name).expanduser()
    if (bare / "adapter_config.json").is_file() and not (runs_folder / name / "run.json").is_file():
        above = bare.resolve().parent.parent
        return _of_run(RunDirectory(above), bare) if (above / "run.json").is_file() else _of_folder(bare)
    if (folder := model_folder(runs_folder, name)) is not None:
        return None if is_retention_lm(folder) else Tuned(PretrainedModel(init_from=str(folder)), None)
    run = find_run(runs_folder, name)
    if run.identity()["profile"].get("kind") != "lora":
        return None
    return _of_run(run, choose_checkpoint(run, checkpoint, report, to_read=True).path)


def model_folder(runs_folder: Path, name: str) -> Path | None:
    """The folder of a whole model, where the name means one and no run."""
    bare = Path(name).expanduser()
    whole = (bare / "config.json").is_file() and not (runs_folder / name / "run.json").is_file()
    return bare.resolve() if whole else None


def is_retention_lm(folder: Path) -> bool:
    """Whether a model's folder is of one that was trained here."""
    from engine.models.pretrained import read_config
    from engine.models.retention_lm import MODEL_TYPE

    return read_config(folder).get("model_type") == MODEL_TYPE


def _of_run(run: RunDirectory, folder: Path) -> Tuned:
    profile = validate_profile(run.identity()["profile"], where=str(run.identity_path))
    assert isinstance(profile, LoRAProfile)
    return Tuned(profile.model, folder, profile.data.chat_template)


def _of_folder(folder: Path) -> Tuned:
    from engine.models.adapters import read_adapter_config  # mlx-lm takes a while to import

    base = read_adapter_config(folder).get("model")
    if not isinstance(base, str) or not base:
        raise UserError(f"{folder}/adapter_config.json: model, the base that it was trained on, is missing")
    return Tuned(PretrainedModel(init_from=base), folder)


def load_tuned(tuned: Tuned, dtype: mx.Dtype | None, report: Report) -> Base:
    """The base, in `dtype` or as in its files, with the adapter's layers in it, if any, their weights in float32.

    What takes long is reported. Raises `UserError` where either cannot be loaded, or the adapter is another model's.
    """
    from engine.data.chat_template import use_template
    from engine.models.adapters import attach_saved
    from engine.models.pretrained import load_base

    lines = LineWriter()

    def say(event: Event) -> None:
        for line in lines.lines(event):
            report(line)

    base = load_base(tuned.model, dtype, Loading(say))
    use_template(base.tokenizer, tuned.chat_template)
    if tuned.adapter is None:
        base.model.eval()
        return base
    learned = attach_saved(base.model, tuned.adapter)
    fresh = base.model.trainable_parameters()  # where all weights were trained, they keep the base's dtype
    base.model.update(tree_map(lambda new, old: new.astype(old.dtype), learned, fresh))
    base.model.eval()
    return base
