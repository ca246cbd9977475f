"""What a run has learned becomes a model of its own: a Hugging Face folder, a GGUF file, or adapters as mlx-lm's."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engine.backend import mx
from engine.checkpoint import choose_checkpoint, list_checkpoints
from engine.errors import UserError
from engine.models.adapters import CONFIG_FILE, WEIGHTS_FILE
from engine.models.pretrained import Base, read_config
from engine.runs import find_run
from engine.tuned import find_tuned, load_tuned, model_folder

import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.gguf import convert_to_gguf
from mlx_lm.utils import dequantize_model, load_model, save_config, save_model

GGUF_FILE = "model-f16.gguf"
_GGUF_TYPES = ("llama", "mistral", "mixtral")


def fuse(
    runs_folder: Path,
    name: str,
    output: Path,
    report: Callable[[str], None],
    *,
    checkpoint: str = "best",
    dequantize: bool = False,
    gguf: bool = False,
) -> None:
    """Writes a run's base with its adapter added to the weights: a folder that any loader of such takes.

    A quantized base stays quantized unless `dequantize`. `gguf` writes `model-f16.gguf` into the folder as well. The
    folder is whole or absent. Weights are read and written a file of 5 GB at a time. Raises `UserError` where that is
    not possible, or something is there already.
    """
    tuned = find_tuned(runs_folder, name, checkpoint, report)
    if model_folder(runs_folder, name) is not None:
        raise UserError(f"{name} is a model's folder without an adapter: there is nothing to fuse")
    if tuned is None or tuned.adapter is None:
        raise UserError(f"{name} has no adapter to fuse: its checkpoints are whole models already")
    with _new_folder(output) as folder:
        base = load_tuned(tuned, None, report)
        if gguf:
            _check_gguf(base, tuned.model.quantize_bits, dequantize)
        _fuse(base.model, dequantize)
        config = dict(base.config)
        if dequantize:
            config.pop("quantization", None)
            config.pop("quantization_config", None)
        report(f"writing {tuned.adapter.name} with its base, {base.name}, to {output}")
        save_model(folder, base.model, donate_model=True)
        save_config(config, folder / "config.json")
        base.tokenizer.save_pretrained(str(folder))
        if (base.folder / "generation_config.json").is_file():
            shutil.copyfile(base.folder / "generation_config.json", folder / "generation_config.json")
        if gguf:
            _write_gguf(folder)


def export_adapters(runs_folder: Path, name: str, output: Path, report: Callable[[str], None]) -> None:
    """Writes the adapters of a run as mlx-lm lays them out.

    adapters.safetensors is the best one (the newest where none was measured), 0000123_adapters.safetensors that of
    each checkpoint; damaged ones are reported and left out. Raises `UserError` where the run has none, or something is
    there already.
    """
    if model_folder(runs_folder, name) is not None:
        raise UserError(f"{name} is a model's folder: it has no adapters")
    run = find_run(runs_folder, name)
    chosen = choose_checkpoint(run, "best", to_read=True)
    if not (chosen.path / WEIGHTS_FILE).is_file():
        raise UserError(f"{name} has no adapters: its checkpoints are whole models")
    with _new_folder(output) as folder:
        for checkpoint in list_checkpoints(run):
            try:
                checkpoint.verify()
            except UserError as error:
                report(f"{error}; it is left out")
                continue
            shutil.copyfile(checkpoint.path / WEIGHTS_FILE, folder / f"{checkpoint.step:07d}_{WEIGHTS_FILE}")
        for file in (WEIGHTS_FILE, CONFIG_FILE):
            shutil.copyfile(chosen.path / file, folder / file)


def _fuse(model: nn.Module, dequantize: bool) -> None:
    """Puts plain modules in the place of adapters', all still to be computed."""
    adapted = [(path, module) for path, module in model.named_modules() if "lora_a" in module]
    model.update_modules(tree_unflatten([(path, module.fuse(dequantize=dequantize)) for path, module in adapted]))
    if dequantize:
        dequantize_model(model)


def _check_gguf(base: Base, quantize_bits: int | None, dequantize: bool) -> None:
    kind = base.config.get("model_type")
    if kind not in _GGUF_TYPES:
        raise UserError(f"--gguf: mlx-lm writes it for {', '.join(_GGUF_TYPES)} only; {base.name} is of type {kind!r}")
    if "quantization" in base.config and not dequantize:
        here = quantize_bits is not None and "quantization" not in read_config(base.folder)
        why = f" when it is loaded (model.quantize_bits = {quantize_bits})" if here else ""
        raise UserError(f"--gguf: {base.name} is quantized{why}, and GGUF is written in 16 bits: give --dequantize too")


def _write_gguf(folder: Path) -> None:
    model, config = load_model(folder, lazy=True)
    weights: dict[str, Any] = dict(tree_flatten(model.parameters()))
    del model
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it says what it does
            convert_to_gguf(folder, weights, config, str(folder / GGUF_FILE))
    except (ValueError, KeyError, AssertionError) as error:
        raise UserError(f"--gguf: mlx-lm cannot write this model or its tokenizer: {error!r}") from error


@contextmanager
def _new_folder(output: Path) -> Iterator[Path]:
    """A folder that has its name once all is in it. What is there already is never touched."""
    if os.path.lexists(output):
        raise UserError(f"{output} exists already; give a name that is free")
    temporary = output.parent / f".{output.name}.writing-{os.getpid()}"
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        yield temporary
        if os.path.lexists(output):
            raise UserError(f"{output} was made meanwhile by somebody else")
        temporary.rename(output)
    except (OSError, RuntimeError) as error:  # MLX reports a failed write as RuntimeError
        reason = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
        raise UserError(f"{output} cannot be written: {reason}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        mx.clear_cache()
