"""The shape of a pretrained base, without loading or downloading it: from its config.json, or a table of known ones.

mlx-lm's own class is instantiated with the base's config, quantized and given its adapter as a run would do it. Its
arrays are lazy: nothing of them is allocated, but their shapes are right for any architecture.
"""

from __future__ import annotations

import json
import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from engine.backend import mx
from engine.errors import UserError
from engine.planning import UnknownShapeError
from engine.profile import LoRAProfile

import mlx.nn as nn
from mlx.utils import tree_flatten

_KNOWN = Path(__file__).with_name("known_bases.toml")
_SAYS_NOTHING = re.compile(
    r"^meta-|-(instruct|it|base|chat|hf|mlx|bf16|fp16|2507|[2-8]bit)(?=-|$)"  # of the shape
)
_BITS = re.compile(r"-([2-8])bit(?=-|$)")
_GROUP_SIZE = 64
"""Numbers that share a scale and a bias, where a name says no more than its bits."""


@dataclass(frozen=True)
class Base:
    """A base and whether its files are on this machine."""

    name: str
    config: Mapping[str, Any]
    """config.json, or the same in short; as the run will have it, quantized where the profile asks for that."""
    is_here: bool


@dataclass(frozen=True)
class Weights:
    """Arrays by what they take: numbers of a floating dtype, and bytes of packed ones, which no dtype changes."""

    floating: int = 0
    packed_bytes: int = 0

    def bytes(self, of_a_number: int) -> int:
        return self.floating * of_a_number + self.packed_bytes


@dataclass(frozen=True)
class Geometry:
    """A base with its adapter, as far as memory and operations depend on it."""

    base: Base
    parameters: int
    """Numbers of the base; a quantized one counts once."""
    width: int
    inner: int
    """Width inside an MLP."""
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    layers: int
    tied: bool
    """The output layer is the embedding."""
    weights: Weights
    """Of the base as it is held, quantized or not."""
    unquantized: Weights
    comes_packed: bool
    """Its files are quantized already."""
    frozen: Weights
    """What of the model does not learn: all of the base, but with adapter.method = full nothing."""
    trained: tuple[tuple[int, ...], ...]
    """Shapes of the arrays that learn."""
    layer_trained: int
    """Numbers that learn in the layer that learns most."""
    matrices: int
    """Numbers of the layers' matrices: each is multiplied with every token."""

    @property
    def trained_numbers(self) -> int:
        return sum(math.prod(shape) for shape in self.trained)


def find_base(profile: LoRAProfile) -> Base:
    """The config of a profile's base.

    Raises `UnknownShapeError` where it is not here and none of the known ones, `UserError` for a folder that is none.
    """
    model = profile.model
    if model.builtin is not None:
        from engine.models.demo_llama import demo_config

        return Base(model.builtin, demo_config(), is_here=True)
    name = str(model.init_from)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return Base(name, _config_in(folder), is_here=True)
    if folder.is_absolute() or name.startswith((".", "~")):
        raise UserError(f"model.init_from = {name!r}: there is no such folder")
    cached = _cached(name, model.revision)
    if cached is not None:
        return Base(name, _config_in(cached), is_here=any(cached.glob("model*.safetensors")))
    config = _known(name)
    if config is None:
        raise UnknownShapeError(f"the shape of model.init_from = {name!r} is known once it has been downloaded")
    return Base(name, config, is_here=False)


def geometry(profile: LoRAProfile) -> Geometry:
    """The shape of a profile's base with its adapter. Raises `UserError` where the two do not go together,
    `UnknownShapeError` where the base is not here and none of the known ones."""
    base, model, adapter = find_base(profile), profile.model, profile.adapter
    return _geometry(
        base.name,
        json.dumps(base.config, sort_keys=True),
        base.is_here,
        model.quantize_bits,
        model.quantize_group_size,
        adapter.model_copy(update={"init_from": None, "dropout": 0.0}).model_dump_json(),
    )


@cache
def _geometry(
    name: str, config_json: str, is_here: bool, bits: int | None, group_size: int, adapter_json: str
) -> Geometry:
    from engine.models.adapters import attach
    from engine.models.pretrained import instantiate
    from engine.profile_lora import Adapter

    config, adapter = json.loads(config_json), Adapter.model_validate_json(adapter_json)
    plain = instantiate({key: value for key, value in config.items() if key != "quantization"})
    comes_packed = "quantization" in config
    if bits is not None and not comes_packed:
        config = {**config, "quantization": {"bits": bits, "group_size": group_size}}
    model = instantiate(config)
    held = _weights(model.parameters())
    attach(model, adapter, seed=0)
    trainable = dict(tree_flatten(model.trainable_parameters()))
    everything = dict(tree_flatten(model.parameters()))
    by_layer: dict[str, int] = {}
    for path, array in trainable.items():
        if found := re.search(r"(?:^|\.)layers\.(\d+)\.", path):
            by_layer[found[1]] = by_layer.get(found[1], 0) + array.size
    text = {**config, **config.get("text_config", {})}
    embedding = max((m.weight.shape for _, m in plain.named_modules() if isinstance(m, nn.Embedding)), default=(0, 0))
    heads = _number(text, "num_attention_heads", "n_head", "n_heads", "num_heads") or 1  # Mamba has none
    width = _number(text, "hidden_size", "n_embd", "d_model", "model_dim") or embedding[1]
    return Geometry(
        base=Base(name, config, is_here),
        parameters=_weights(plain.parameters()).floating,
        width=width,
        inner=_number(text, "intermediate_size") or 4 * width,
        heads=heads,
        kv_heads=_number(text, "num_key_value_heads") or heads,
        head_dim=_number(text, "head_dim") or width // heads,
        vocabulary=_number(text, "vocab_size") or embedding[0],
        layers=len(model.layers),
        tied="lm_head" not in model,
        weights=held,
        unquantized=_weights(plain.parameters()),
        comes_packed=comes_packed,
        frozen=_weights({path: array for path, array in everything.items() if path not in trainable}),
        trained=tuple(array.shape for array in trainable.values()),
        layer_trained=max(by_layer.values(), default=0),
        matrices=_matrices(plain),
    )


def _number(config: Mapping[str, Any], *names: str) -> int:
    """The first of these that a config has, the largest where layers have their own; 0 where it has none."""
    for name in names:
        if value := config.get(name):
            return int(max(value) if isinstance(value, list) else value)
    return 0


def _weights(parameters: Any) -> Weights:
    arrays = [array for _, array in tree_flatten(parameters)]
    floating = [array for array in arrays if mx.issubdtype(array.dtype, mx.floating)]
    packed = sum(array.nbytes for array in arrays) - sum(array.nbytes for array in floating)
    return Weights(sum(array.size for array in floating), packed)


def _matrices(model: nn.Module) -> int:
    layers = [tree_flatten(layer.parameters()) for layer in model.layers]
    return sum(array.size for layer in layers for _, array in layer if array.ndim >= 2)


def _config_in(folder: Path) -> dict[str, Any]:
    from engine.models.pretrained import check_folder, read_config

    if not (folder / "config.json").is_file():
        check_folder(folder)  # says what the folder is instead
    return read_config(folder)


def _cached(name: str, revision: str | None) -> Path | None:
    """The folder of a config.json in the hub's cache."""
    try:
        found = try_to_load_from_cache(name, "config.json", revision=revision)
    except ValueError:  # no name of the hub's
        return None
    return Path(found).parent if isinstance(found, str) else None


def _known(name: str) -> dict[str, Any] | None:
    """The config of one of the known bases, by the last part of its name."""
    last = name.rpartition("/")[2].lower()
    bits, plain = _BITS.search(last), last
    while (shorter := _SAYS_NOTHING.sub("", plain)) != plain:
        plain = shorter
    config = _known_configs().get(plain)
    if config is None or bits is None:
        return config
    return {**config, "quantization": {"bits": int(bits[1]), "group_size": _GROUP_SIZE}}


@cache
def _known_configs() -> dict[str, dict[str, Any]]:
    families = tomllib.loads(_KNOWN.read_text(encoding="utf-8"))
    return {
        name: {**{key: value for key, value in family.items() if key != "members"}, **own}
        for family in families.values()
        for name, own in family["members"].items()
    }
