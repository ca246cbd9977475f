"""What is learned on top of a base: LoRA, DoRA or all weights, as mlx-lm's layers and in mlx-lm's files.

adapters.safetensors    the weights that were trained, by their names in the model
adapter_config.json     fine_tune_type, num_layers, lora_parameters {rank, scale, dropout, keys}, model
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from engine.backend import mx
from engine.durable import write_json
from engine.errors import UserError
from engine.profile_lora import Adapter

import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear
from mlx_lm.tuner.utils import linear_to_lora_layers

WEIGHTS_FILE = "adapters.safetensors"
CONFIG_FILE = "adapter_config.json"

_QUANTIZED = (nn.QuantizedLinear, nn.QuantizedEmbedding, QuantizedSwitchLinear)
_LINEAR = (nn.Linear, nn.QuantizedLinear, SwitchLinear, QuantizedSwitchLinear)
_ALIKE = 0.6


def attach(model: nn.Module, adapter: Adapter, seed: int) -> None:
    """Freezes a model but for what `adapter` says shall learn, and puts it in training mode.

    The targets in its last layers become mlx-lm's LoRA or DoRA layers, whose first values are drawn from the seed.
    Raises `UserError` for a target, or a number of layers, that the model does not have.
    """
    config = adapter_config(adapter, model, "")
    mx.random.seed(seed)
    _convert(model, config)
    model.train()


def adapter_config(adapter: Adapter, model: nn.Module, base_name: str) -> dict[str, Any]:
    """adapter_config.json of an adapter on a base, attached already or not. Raises `UserError` as `attach` does."""
    layers = _layers(model)
    if adapter.layers is not None and adapter.layers > len(layers):
        raise UserError(f"adapter.layers = {adapter.layers}: the model has {len(layers)} layers")
    config: dict[str, Any] = {
        "fine_tune_type": adapter.method,
        "model": base_name,
        "num_layers": adapter.layers or len(layers),
    }
    if adapter.method == "full":
        return config | {"lora_parameters": None} | ({} if adapter.layers else {"num_layers": -1})
    keys = _keys(layers[-config["num_layers"] :], adapter.targets)
    parameters = {"rank": adapter.rank, "scale": adapter.scale, "dropout": adapter.dropout, "keys": keys}
    return config | {"lora_parameters": parameters}


def attach_saved(model: nn.Module, folder: Path) -> Any:
    """Turns a base's modules into what a folder's adapter is of, and gives back its weights, as `load_adapter` does."""
    config = read_adapter_config(folder)
    if config["fine_tune_type"] == "full":
        _unfreeze(model, _read_weights(folder))  # mlx-lm's -1 layers are without the embedding, ours with it
    else:
        _convert(model, config)
    return load_adapter(folder, model, None)


def load_adapter(folder: Path, model: nn.Module, adapter: Adapter | None) -> Any:
    """The trained weights in a folder of ours or mlx-lm's as a tree in float32, for a model that has its modules.

    Raises `UserError` with the first thing in which it differs: from `adapter`, where given, and from the model.
    """
    config = read_adapter_config(folder)
    if adapter is not None:
        compare_settings(folder, adapter)
        _compare_layers(folder, config, adapter, model)
    weights = _read_weights(folder)
    expected = dict(tree_flatten(model.trainable_parameters()))
    trained_on = f" (it was trained on {config['model']})" if config.get("model") else ""
    for name in sorted(weights):  # the first difference is the same every time
        if name not in expected:
            raise UserError(f"{folder}: its adapter has {name}, which is not trained here{trained_on}")
    for name, array in expected.items():
        if name not in weights:
            raise UserError(f"{folder}: its adapter has no {name}, which is trained here{trained_on}")
        if weights[name].shape != array.shape:
            theirs, ours = _shape(weights[name]), _shape(array)
            raise UserError(f"{folder}: its {name} is {theirs}, this model's is {ours}{trained_on}")
    return tree_unflatten([(name, weights[name].astype(mx.float32)) for name in expected])


def compare_settings(folder: Path, adapter: Adapter) -> None:
    """Raises `UserError` where a saved adapter is not what the profile asks for, as far as no model is needed."""
    config = read_adapter_config(folder)
    if config["fine_tune_type"] != adapter.method:
        raise UserError(
            f"{folder}: its adapter is of method {config['fine_tune_type']}, adapter.method is {adapter.method}"
        )
    if adapter.method == "full":
        return
    theirs = config["lora_parameters"]
    if theirs["rank"] != adapter.rank:
        raise UserError(f"{folder}: its adapter has rank {theirs['rank']}, adapter.rank is {adapter.rank}")
    if abs(theirs["scale"] - adapter.scale) > 1e-6 * adapter.scale:
        raise UserError(
            f"{folder}: its adapter has scale {theirs['scale']:g}, the profile's alpha / rank is {adapter.scale:g}; "
            f"set adapter.alpha = {theirs['scale'] * adapter.rank:g}"
        )


def save_adapter(folder: Path, parameters: Any, config: Mapping[str, Any]) -> None:
    """Writes trained weights, a tree, and the config that `adapter_config` made, into a folder that exists."""
    mx.save_safetensors(str(folder / WEIGHTS_FILE), dict(tree_flatten(parameters)), metadata={"format": "mlx"})
    write_json(folder / CONFIG_FILE, dict(sorted(config.items())))


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json of a folder, its kind filled in. Raises `UserError` where it cannot be used."""
    path = folder / CONFIG_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder} is no adapter: there is no {CONFIG_FILE}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} should be an object")
    if "peft_type" in config:
        raise UserError(f"{path} was written by PEFT; only adapters of mlx-lm's layout can be loaded")
    config.setdefault("fine_tune_type", "lora")
    if config["fine_tune_type"] not in ("lora", "dora", "full"):
        raise UserError(f"{path}: fine_tune_type = {config['fine_tune_type']!r} should be lora, dora or full")
    if config["fine_tune_type"] != "full":
        parameters = config.get("lora_parameters")
        if not isinstance(parameters, dict) or not {"rank", "scale"} <= parameters.keys():
            raise UserError(f"{path}: lora_parameters should have rank and scale")
        if not isinstance(config.get("num_layers"), int):
            raise UserError(f"{path}: num_layers is missing")
        parameters.setdefault("dropout", 0.0)
    return config


def _convert(model: nn.Module, config: Mapping[str, Any]) -> None:
    """Freezes all but what the config says is trained."""
    model.freeze()
    method, count = config["fine_tune_type"], config.get("num_layers", -1)
    if method == "full":
        if any(isinstance(module, _QUANTIZED) for _, module in model.named_modules()):
            raise UserError(
                'adapter.method = "full": the base is quantized, and whole numbers have no gradient; '
                'use "lora", or a base that is not quantized'
            )
        for part in _layers(model)[-count:] if count > 0 else [model]:
            part.unfreeze()
        return
    try:
        linear_to_lora_layers(model, count, config["lora_parameters"], use_dora=method == "dora")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f'adapter.method = "{method}" does not work here: {" ".join(str(error).split())}') from None


def _unfreeze(model: nn.Module, names: Iterable[str]) -> None:
    """Lets exactly these parameters learn, as far as the model has them."""
    model.freeze()
    modules = dict(model.named_modules())
    for path, _, name in (name.rpartition(".") for name in names):
        if name in modules.get(path, ()):
            modules[path].unfreeze(recurse=False, keys=name)


def _layers(model: nn.Module) -> list[nn.Module]:
    layers = getattr(model, "layers", None)
    if not layers:
        raise UserError(f"{type(model).__module__}: the model has no list of layers, which adapters are put on")
    return list(layers)


def _keys(layers: Iterable[nn.Module], targets: Iterable[str]) -> list[str]:
    """The paths inside layers that the targets name by their last parts."""
    there = sorted({path for layer in layers for path in _linear(layer)})
    chosen: set[str] = set()
    for target in targets:
        found = there if target == "all" else [path for path in there if f".{path}".endswith(f".{target}")]
        if not found:
            raise UserError(f"adapter.targets: {target!r} is no module of the model's layers; {_known(target, there)}")
        chosen.update(found)
    return sorted(chosen)


def _linear(layer: nn.Module) -> list[str]:
    """The paths of linear modules, or of what has been wrapped around them already."""
    modules = dict(layer.named_modules())
    wrapped = [path for path, module in modules.items() if "lora_a" in module]
    plain = (path for path, module in modules.items() if isinstance(module, _LINEAR) or hasattr(module, "to_lora"))
    return [*wrapped, *(path for path in plain if not path.startswith(tuple(f"{outer}." for outer in wrapped)))]


def _known(name: str, there: Iterable[str]) -> str:
    names = sorted({path.rpartition(".")[2] for path in there})
    close = difflib.get_close_matches(name.rpartition(".")[2], names, n=1, cutoff=_ALIKE)
    nearest = f"did you mean {close[0]!r}? " if close else ""
    return f"{nearest}it has {', '.join(names)}"


def _compare_layers(folder: Path, config: Mapping[str, Any], adapter: Adapter, model: nn.Module) -> None:
    if adapter.method == "full":
        return
    ours = adapter_config(adapter, model, "")
    count = config["num_layers"] if config["num_layers"] > 0 else len(_layers(model))
    if min(count, len(_layers(model))) != ours["num_layers"]:
        raise UserError(f"{folder}: its adapter is on {count} layers, adapter.layers is {ours['num_layers']}")


def _read_weights(folder: Path) -> dict[str, mx.array]:
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise UserError(f"{folder}: there is no {WEIGHTS_FILE}")
    try:
        weights = mx.load(str(path))
    except RuntimeError as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    assert isinstance(weights, dict)
    return weights


def _shape(array: mx.array) -> str:
    return " x ".join(map(str, array.shape))
