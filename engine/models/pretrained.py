"""A pretrained base: found, looked over, and loaded lazily through mlx-lm. Nothing that came with it is executed."""

from __future__ import annotations

import importlib.util
import json
import re
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.backend import mx
from engine.errors import UserError
from engine.hub import fetch_model
from engine.loading import Loading
from engine.profile_lora import PretrainedModel

import mlx.nn as nn
from mlx.utils import tree_map_with_path, tree_unflatten
from mlx_lm.utils import MODEL_REMAPPING, _get_classes, load_model, load_tokenizer

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.npz")
_TOKENIZERS = ("tokenizer.json", "*.model", "*.tiktoken", "tekken.json", "vocab.*")
_OTHER_ROWS = re.compile(
    r"Expected shape \((\d+),.*\) but received shape \((\d+),.*\) for parameter "
    r"(\S*(?:embed_tokens|tok_embeddings|word_embeddings|wte|lm_head)\.\S*)"
)
_FAULTS_OF_DATA = (OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, ArithmeticError)
_LOADING_ERRORS = (*_FAULTS_OF_DATA, AssertionError, ImportError, SystemExit)  # OLMo's module exits, in fact
"""What a config that does not fit, or a missing package of a tokenizer's, ends in somewhere inside the libraries."""


@dataclass(frozen=True)
class Base:
    """What is learned on top of: a frozen model whose weights are read when they are first needed, and its tokenizer.

    `name` is what an adapter calls it: the name on the hub, or the folder; `config` is config.json as mlx-lm reads it.
    """

    model: nn.Module
    tokenizer: Any
    config: dict[str, Any]
    name: str
    folder: Path


def load_base(model: PretrainedModel, dtype: mx.Dtype | None, loading: Loading) -> Base:
    """Loads the base that a profile names, and quantizes it where that was asked for.

    Its floating weights are turned into `dtype`, or stay as they are in its files where that is None. Raises
    `UserError` for what is not there or cannot be loaded, and lets `Interrupted` through.
    """
    name, folder = find_base(model, loading)
    check_folder(folder)
    if model.trust_remote_code:
        loading.warn(f"trust_remote_code is on: the tokenizer of {name} may run code that was downloaded with it")
    if not model.trust_remote_code:
        _check_tokenizer(folder)
    with _in_one_line(f"{folder}: its model cannot be loaded"), _vocabulary_told(folder):
        net, config = load_model(folder, lazy=True, strict=True)
    tokenizer = _tokenizer(folder, config, model.trust_remote_code)
    if model.quantize_bits is not None:
        if "quantization" in config:
            loading.tell(f"{name} is quantized already ({_in_bits(config)}): model.quantize_bits changes nothing")
        else:
            _quantize(net, config, model.quantize_bits, model.quantize_group_size, loading)
    if dtype is not None:
        cast(net, dtype)
    net.freeze()
    return Base(net, tokenizer, config, name, folder)


def find_base(model: PretrainedModel, loading: Loading) -> tuple[str, Path]:
    """What the base is called, and its folder; downloads it where it is a name on the hub that is not here yet."""
    if model.builtin is not None:
        from engine.models.demo_llama import demo_llama

        folder = demo_llama(loading)
        return str(folder), folder
    assert model.init_from is not None
    folder = Path(model.init_from).expanduser()
    if folder.is_dir():
        return str(folder.resolve()), folder.resolve()
    if folder.is_absolute() or model.init_from.startswith((".", "~")) or model.init_from.count("/") > 1:
        raise UserError(f"model.init_from = {model.init_from!r}: there is no such folder")
    return model.init_from, fetch_model(model.init_from, model.revision, loading)


def check_folder(folder: Path) -> None:
    """Raises `UserError` where a model's folder is incomplete, or holds what only running its code could load."""
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise UserError(
                f"{folder} is an adapter, not a base: name it as adapter.init_from, and its base as model.init_from"
            )
        raise UserError(f"{folder}: there is no config.json; a base is a folder with config.json and *.safetensors")
    config = read_config(folder)
    if config.get("model_file"):
        raise UserError(
            f"{folder}/config.json: model_file = {config['model_file']!r} asks to run code that came with the model; "
            "only models that mlx-lm itself knows are loaded"
        )
    check_type(config, f"{folder}/config.json")
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
        why = f"only {pickles[0]}, which could run code when it is read" if pickles else "no weights"
        raise UserError(f"{folder} has {why}: it needs model.safetensors")
    _check_shards(folder, {path.name for path in files})
    for path in files:
        _check_length(path)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json. Raises `UserError` where it is not an object of JSON."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}/config.json cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{folder}/config.json should be an object")
    return config


def check_type(config: Mapping[str, Any], where: str) -> None:
    """Raises `UserError` where mlx-lm has no architecture of this config's name."""
    kind = config.get("model_type")
    known = isinstance(kind, str) and MODEL_REMAPPING.get(kind, kind)
    if not known or not str(known).isidentifier() or importlib.util.find_spec(f"mlx_lm.models.{known}") is None:
        raise UserError(f"{where}: model_type = {kind!r} is none that the installed mlx-lm can load")


def instantiate(config: Mapping[str, Any]) -> nn.Module:
    """The model of a config with random weights that are never computed unless asked for: no files, no memory.

    Quantized as config["quantization"] says. For planning and benchmarks. Raises `UserError` for an unknown one.
    """
    check_type(config, "config")
    with _in_one_line("config: no model can be made of it"):
        model_class, arguments = _get_classes(dict(config))
        model = model_class(arguments.from_dict(dict(config)))
    if quantization := config.get("quantization"):
        own = {path: entry for path, entry in quantization.items() if isinstance(entry, dict | bool)}
        size, bits = quantization["group_size"], quantization["bits"]

        def chosen(path: str, module: nn.Module) -> bool | dict[str, Any]:
            return own.get(path, _can_be_quantized(module, size))

        nn.quantize(model, size, bits, mode=quantization.get("mode", "affine"), class_predicate=chosen)
    model.freeze()
    model.eval()
    return model


def vocabulary_size(base: Base) -> int:
    """Rows of the embedding: every token id is below it."""
    rows = [
        module.weight.shape[0]
        for _, module in base.model.named_modules()
        if isinstance(module, nn.Embedding | nn.QuantizedEmbedding)
    ]
    named = base.config.get("vocab_size") or base.config.get("text_config", {}).get("vocab_size")
    return int(named if named in rows or not rows else max(rows))


def cast(model: nn.Module, dtype: mx.Dtype) -> None:
    """Turns floating weights into `dtype`, lazily; those that the architecture needs in their own stay."""
    stays = getattr(model, "cast_predicate", lambda path: True)

    def turn(path: str, array: mx.array) -> mx.array:
        return array.astype(dtype) if mx.issubdtype(array.dtype, mx.floating) and stays(path) else array

    model.update(tree_map_with_path(turn, model.parameters()))


def _check_tokenizer(folder: Path) -> None:
    if not any(next(folder.glob(pattern), None) for pattern in _TOKENIZERS):
        raise UserError(
            f"{folder}: there is no tokenizer.json in it, nor another file of a tokenizer; "
            "copy those that belong to the model"
        )


@contextmanager
def _vocabulary_told(folder: Path) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        if (found := _OTHER_ROWS.search(str(error))) and found[1] != found[2]:
            raise UserError(
                f"{folder}: its weights are of another vocabulary than its config.json: {found[3]} has "
                f"{int(found[2]):,} rows, vocab_size says {int(found[1]):,}; they do not belong together"
            ) from None
        raise


def _tokenizer(folder: Path, config: Mapping[str, Any], trusted: bool) -> Any:
    with _in_one_line(f"{folder}: its tokenizer cannot be loaded"):
        try:
            # Said in either case: transformers would ask on the terminal where it is not told.
            settings = {"trust_remote_code": trusted}
            return load_tokenizer(folder, settings, eos_token_ids=config.get("eos_token_id"))
        except ValueError as error:
            if trusted or "custom code" not in str(error):
                raise
            raise UserError(
                f"{folder}: its tokenizer asks to run code that came with it; "
                "model.trust_remote_code = true lets it, if you trust where it is from"
            ) from None


def _quantize(net: nn.Module, config: dict[str, Any], bits: int, group_size: int, loading: Loading) -> None:
    """Module by module, each evaluated and its original dropped: the model is never held twice."""
    rule = getattr(net, "quant_predicate", None)
    entries: dict[str, Any] = {"group_size": group_size, "bits": bits, "mode": "affine"}
    paths = [path for path, module in net.named_modules() if hasattr(module, "to_quantized")]
    modules = dict(net.named_modules())
    left = []
    for done, path in enumerate(sorted(paths)):
        loading.progress(f"quantizing to {bits} bits", done, len(paths), "modules")
        module = modules.pop(path)
        asked: Any = rule(path, module) if rule is not None else True
        if not asked or not _can_be_quantized(module, group_size):
            left.append(path)
            continue
        if isinstance(asked, dict):
            entries[path] = asked
        own = asked if isinstance(asked, dict) else {"group_size": group_size, "bits": bits}
        quantized = module.to_quantized(**own)
        mx.eval(quantized.parameters())
        net.update_modules(tree_unflatten([(path, quantized)]))
        del module, quantized
        mx.clear_cache()
    loading.progress(f"quantizing to {bits} bits", len(paths), len(paths), "modules")
    if len(left) == len(paths):
        raise UserError(f"model.quantize_group_size = {group_size}: no module has rows that it divides")
    if left:
        loading.tell(f"{len(left)} of {len(paths)} modules stay as they are: groups of {group_size} do not fit them")
    config["quantization"] = config["quantization_config"] = entries


def _can_be_quantized(module: nn.Module, group_size: int) -> bool:
    return hasattr(module, "to_quantized") and module.weight.shape[-1] % group_size == 0


def _in_bits(config: Mapping[str, Any]) -> str:
    quantization = config["quantization"]
    return f"{quantization.get('bits', '?')} bits, groups of {quantization.get('group_size', '?')}"


def _check_shards(folder: Path, present: set[str]) -> None:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return
    try:
        named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{index} cannot be read: {error}") from None
    if missing := sorted(named - present):
        raise UserError(f"{folder}: {len(missing)} of {len(named)} files of weights are missing: {missing[0]} …")


def _check_length(path: Path) -> None:
    """The header of a safetensors file says where the file ends; MLX notices only when it reads that far."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            size = path.stat().st_size
            if length > size:
                raise ValueError("its header is cut off")
            header = json.loads(file.read(length))
        end = (
            8
            + length
            + max((entry["data_offsets"][1] for name, entry in header.items() if name[:2] != "__"), default=0)
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise UserError(f"{path} is no safetensors file: {error}") from None
    if size < end:
        raise UserError(f"{path} is incomplete: {size:,} of {end:,} bytes; download or copy it again")


@contextmanager
def _in_one_line(what: str) -> Iterator[None]:
    try:
        yield
    except _LOADING_ERRORS as error:
        words = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, KeyError):
            words = f"{words} is missing"
        elif isinstance(error, SystemExit):
            words = "mlx-lm asks for a package that is not installed"
        raise UserError(f"{what}: {words[:300]}{'…' if len(words) > 300 else ''}") from None
