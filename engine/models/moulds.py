"""What layers that are alike share: one compiled function, which is told the arrays of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.backend import mx
from engine.models.anatomy import Arguments

import mlx.nn as nn
from mlx.utils import tree_flatten


@dataclass(frozen=True)
class _Place:
    index: int


def split_arguments(given: Arguments) -> tuple[list[mx.array], Any]:
    """The arrays of a layer's arguments, and the rest of them, with a place for each array."""
    arrays: list[mx.array] = []

    def take(value: Any) -> Any:
        if isinstance(value, mx.array):
            arrays.append(value)
            return _Place(len(arrays) - 1)
        return value

    positional = tuple(map(take, given.positional))
    named = tuple((name, take(value)) for name, value in given.named)
    return arrays, (positional, named)


def join_arguments(still: Any, arrays: Sequence[mx.array]) -> Arguments:
    """The arguments again, with these arrays in their places."""

    def give(value: Any) -> Any:
        return arrays[value.index] if isinstance(value, _Place) else value

    positional, named = still
    return Arguments(tuple(map(give, positional)), tuple((name, give(value)) for name, value in named))


def build_of(layer: nn.Module) -> Any:
    """All that a layer's computation depends on beside its weights: what two layers share where this is equal."""
    parts: list[Any] = []
    for name, module in sorted(layer.named_modules(), key=lambda item: item[0]):
        parts.append((name, type(module)))
        for key, value in sorted((*vars(module).items(), *module.items()), key=lambda item: str(item[0])):
            is_parameter = not str(key).startswith("_")
            if isinstance(value, mx.array):
                content = None if is_parameter else np.asarray(value.astype(mx.float32)).tobytes()
                parts.append((key, value.shape, value.dtype, content))
            elif isinstance(value, list | tuple | dict) and not isinstance(value, nn.Module):
                parts.extend(
                    (key, name, _known_by(leaf))
                    for name, leaf in tree_flatten(value)
                    if not (is_parameter and isinstance(leaf, mx.array))  # weights are given to the function
                )
            elif not isinstance(value, nn.Module | set):
                parts.append((key, _known_by(value)))
    return tuple(parts)


def _known_by(value: Any) -> Any:
    """What two values that are the same have in common."""
    return value if isinstance(value, int | float | str | bool | type(None)) else id(value)
