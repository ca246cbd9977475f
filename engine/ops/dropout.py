"""Dropout whose masks come from keys that are given, so that what is computed again is computed with the same ones."""

from __future__ import annotations

from engine.backend import mx, on_gpu

import mlx.nn as nn
from mlx.utils import tree_unflatten


class Keys:
    """Random keys in a fixed order: after `begin` with the same key, `next` gives the same ones."""

    def __init__(self) -> None:
        self._key: mx.array | None = None

    def begin(self, key: mx.array) -> None:
        """From now on keys follow from this one."""
        self._key = key

    def next(self) -> mx.array:
        """A key that has not been given since `begin`."""
        assert self._key is not None, "no key was given"
        self._key, now = mx.random.split(self._key)
        return now


class KeyedDropout(nn.Module):
    """Zeroes each number with probability `rate` and scales the rest by 1 / (1 − rate), while it trains."""

    def __init__(self, rate: float, keys: Keys) -> None:
        super().__init__()
        self.rate, self._keys = rate, keys

    def __call__(self, x: mx.array) -> mx.array:
        if not self.training or self.rate == 0:
            return x
        key, zero = self._keys.next(), mx.array(0, dtype=x.dtype)
        if on_gpu():  # sixteen random bits are fine enough for a rate, and half as much to keep
            dropped = mx.random.uniform(shape=x.shape, dtype=mx.float16, key=key) < self.rate
        else:  # which a CPU is slower at
            dropped = mx.random.bernoulli(self.rate, x.shape, key=key)
        return mx.where(dropped, zero, x * (1 / (1 - self.rate)))


def take_keys(model: nn.Module, keys: Keys, rate: float) -> None:
    """Gives every dropout of a model its masks from `keys`."""
    found = [name for name, module in model.named_modules() if isinstance(module, nn.Dropout)]
    if found:
        model.update_modules(tree_unflatten([(name, KeyedDropout(rate, keys)) for name in found]))
