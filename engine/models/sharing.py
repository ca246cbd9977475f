"""A second module that shares every array of a first."""

from __future__ import annotations

from typing import Any, TypeVar

import mlx.nn as nn

M = TypeVar("M", bound=nn.Module)


def twin(module: M) -> M:
    """A module of the same classes with the same arrays, none of them copied, that can be given others.

    Giving weights to either, freezing it, or changing its mode leaves the other as it is. What is in the tree twice
    (tied weights) is in the twin's twice.
    """
    return _twin(module, {})


def _twin(value: Any, made: dict[int, Any]) -> Any:
    if id(value) in made:
        return made[id(value)]
    if isinstance(value, nn.Module):
        made[id(value)] = second = type(value).__new__(type(value))
        for name, attribute in vars(value).items():  # plain attributes: _no_grad, _training, sizes …
            object.__setattr__(second, name, _twin(attribute, made))
        for name, item in value.items():
            second[name] = _twin(item, made)
        return second
    if type(value) is dict:
        return {key: _twin(item, made) for key, item in value.items()}
    if type(value) in (list, tuple, set):
        return type(value)(_twin(item, made) for item in value)
    return value
