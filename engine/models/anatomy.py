"""Where a language model can be cut: what comes before its layers, the layers one by one, and what comes after.

It serves every model whose `layers` take the hidden states first and hand them on: those of mlx-lm, and our own. The
model itself says how: it is run with its layers replaced, so that nothing of an architecture has to be known here.
Before such a cut is used, it is compared with the model as a whole.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from engine.backend import is_out_of_memory, mx, scalar

import mlx.nn as nn
from mlx.utils import tree_flatten

Call = Callable[..., mx.array]
"""`call(layer, hidden, …)`: what is done in a layer's place, with what the model hands to it."""

_TOKENS = 8
_EXACT_ENOUGH = 1e-2
"""Of the largest logit, or of what a layer adds on average: float16 and bfloat16 round the same sums differently."""


class CannotCutError(Exception):
    """Why a model cannot be taken layer by layer, in words."""


@dataclass(frozen=True)
class Arguments:
    """What a layer is called with beside the hidden states: a mask, no cache."""

    positional: tuple[Any, ...] = ()
    named: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Half:
    """A part of a layer that ends in a residual sum.

    `by_token`: it treats every token alone. `modules` are those of the layer that it uses; empty for all of them.
    """

    run: Call
    by_token: bool
    modules: tuple[str, ...] = ()

    def uses(self, parameter: str) -> bool:
        return not self.modules or parameter.partition(".")[0] in self.modules


class Anatomy:
    """A model with its layers in sight. Raises `CannotCutError` where it has none."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._owner, self._name, self.path = _owner_of_layers(model)
        self.layers: Sequence[nn.Module] = tuple(self._owner[self._name])
        self._parts: list[tuple[Half, ...]] | None = None

    def run(self, tokens: mx.array, call: Call) -> mx.array:
        """The model's logits, with `call` in the place of each layer."""
        with self._replaced([call] * len(self.layers)):
            return self.model(tokens)

    def hidden(self, tokens: mx.array, call: Call) -> mx.array:
        """What the last layer hands on: [batch, time, width]; `call` as in `run`."""
        last: list[mx.array] = []
        index = 0

        def keep(layer: nn.Module, *args: Any, **kwargs: Any) -> mx.array:
            nonlocal index
            index += 1
            out = call(layer, *args, **kwargs)
            if index == len(self.layers):
                last.append(out)
            return out

        self.run(tokens, keep)
        return last[0]

    def enter(self, tokens: mx.array) -> tuple[mx.array, list[Arguments]]:
        """What the first layer is given, and what each is called with beside. Raises `CannotCutError`."""
        seen: list[tuple[Any, Arguments]] = []

        def pass_on(layer: nn.Module, hidden: Any, *args: Any, **kwargs: Any) -> Any:
            seen.append((hidden, Arguments(args, tuple(sorted(kwargs.items(), key=lambda item: item[0])))))
            return hidden

        self.run(tokens, pass_on)
        if len(seen) != len(self.layers):
            raise CannotCutError(f"{len(seen)} of its {len(self.layers)} layers are called")
        hidden = seen[0][0]
        if not isinstance(hidden, mx.array) or hidden.ndim != 3 or any(item is not hidden for item, _ in seen):
            raise CannotCutError("something happens between its layers")
        return hidden, [arguments for _, arguments in seen]

    def leave(self, hidden: mx.array) -> mx.array:
        """Logits [batch, time, vocabulary] of what the last layer hands on: [batch, time, width]."""
        with self._replaced([lambda layer, _first, *args, **kwargs: hidden] * len(self.layers)):
            return self.model(mx.zeros(hidden.shape[:2], dtype=mx.int32))

    def check(self) -> list[tuple[Half, ...]]:
        """The halves of each layer; a layer that has none is one part. Compares them all with the whole model.

        Raises `CannotCutError` where the parts do not make the whole. Evaluates the model on a few tokens, once.
        """
        if self._parts is None:
            self._parts = self._compare()
        return self._parts

    def _compare(self) -> list[tuple[Half, ...]]:
        tokens = mx.arange(1, 2 * _TOKENS + 1).reshape(2, _TOKENS)
        try:
            whole = self.model(tokens)
            hidden, arguments = self.enter(tokens)
            parts: list[tuple[Half, ...]] = []
            for layer, given in zip(self.layers, arguments, strict=True):
                after = layer(hidden, *given.positional, **dict(given.named))
                if not isinstance(after, mx.array) or after.shape != hidden.shape:
                    raise CannotCutError("its layers hand on more than hidden states")
                parts.append(_halves(layer, hidden, given, after) or (WHOLE_LAYER,))
                hidden = after
            mx.eval(hidden)
            if not _alike(self.leave(hidden), whole):
                raise CannotCutError("its layers, one after the other, do not make the same logits")
        except CannotCutError:
            raise
        except Exception as error:  # an architecture that nobody thought of
            if is_out_of_memory(error):
                raise
            raise CannotCutError(" ".join(str(error).split()) or type(error).__name__) from error
        return parts

    @contextlib.contextmanager
    def _replaced(self, calls: Sequence[Call]) -> Iterator[None]:
        layers = self._owner[self._name]
        self._owner[self._name] = [_Stub(layer, call) for layer, call in zip(layers, calls, strict=True)]
        try:
            yield
        finally:
            self._owner[self._name] = layers


class _Stub:
    """Stands in a layer's place; what is asked of the layer beside a call, the layer answers."""

    def __init__(self, layer: nn.Module, call: Call) -> None:
        self._layer, self._call = layer, call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(self._layer, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


def _run_layer(layer: nn.Module, hidden: mx.array, *args: Any, **kwargs: Any) -> mx.array:
    return layer(hidden, *args, **kwargs)


def _attend(layer: nn.Module, hidden: mx.array, *args: Any, **kwargs: Any) -> mx.array:
    return hidden + layer.self_attn(layer.input_layernorm(hidden), *args, **kwargs)


def _think(layer: nn.Module, hidden: mx.array, *_args: Any, **_kwargs: Any) -> mx.array:
    return hidden + layer.mlp(layer.post_attention_layernorm(hidden))


def _attend_scaled(layer: nn.Module, hidden: mx.array, *args: Any, **kwargs: Any) -> mx.array:
    return hidden + layer.self_attn(layer.input_layernorm(hidden), *args, **kwargs) * layer.residual_multiplier


def _think_scaled(layer: nn.Module, hidden: mx.array, *_args: Any, **_kwargs: Any) -> mx.array:
    return hidden + layer.mlp(layer.post_attention_layernorm(hidden)) * layer.residual_multiplier


def _attend_and_norm(layer: nn.Module, hidden: mx.array, *args: Any, **kwargs: Any) -> mx.array:
    before = layer.input_layernorm(hidden) if "input_layernorm" in layer else hidden
    return hidden + layer.post_attention_layernorm(layer.self_attn(before, *args, **kwargs))


def _think_and_norm(layer: nn.Module, hidden: mx.array, *_args: Any, **_kwargs: Any) -> mx.array:
    before = layer.pre_feedforward_layernorm(hidden) if "pre_feedforward_layernorm" in layer else hidden
    return hidden + layer.post_feedforward_layernorm(layer.mlp(before))


def _retain(layer: nn.Module, hidden: mx.array) -> mx.array:
    return layer.retain(hidden)


def _transform(layer: nn.Module, hidden: mx.array) -> mx.array:
    return layer.transform(hidden)


WHOLE_LAYER = Half(_run_layer, by_token=False)
_ATTENTION, _MLP = ("self_attn", "input_layernorm"), ("mlp", "post_attention_layernorm")
_PAIRS = (
    (Half(_attend, by_token=False, modules=_ATTENTION), Half(_think, by_token=True, modules=_MLP)),  # most of mlx-lm's
    (Half(_attend_scaled, by_token=False, modules=_ATTENTION), Half(_think_scaled, by_token=True, modules=_MLP)),
    (  # Gemma's, with four norms, and OLMo 2's, with two of them
        Half(_attend_and_norm, by_token=False, modules=(*_ATTENTION, "post_attention_layernorm")),
        Half(
            _think_and_norm,
            by_token=True,
            modules=("mlp", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
        ),
    ),
    (  # our own
        Half(_retain, by_token=False, modules=("retention", "gate", "retention_norm")),
        Half(_transform, by_token=True, modules=("mlp", "mlp_norm")),
    ),
)


def _halves(layer: nn.Module, hidden: mx.array, given: Arguments, after: mx.array) -> tuple[Half, ...] | None:
    """The pair of halves that makes the same of some hidden states as the layer itself."""
    for pair in _PAIRS:
        try:
            between = pair[0].run(layer, hidden, *given.positional, **dict(given.named))
            if _add_alike(pair[1].run(layer, between), after, hidden):
                return pair
        except Exception as error:
            if is_out_of_memory(error):
                raise  # else it is built otherwise
    return None


def _add_alike(one: mx.array, other: mx.array, before: mx.array) -> bool:
    """Whether both add the same to hidden states.

    Of these a few numbers are thousands of times larger than the rest (massive activations, arXiv 2402.17762): beside
    the largest of the sums any difference would pass.
    """
    one, other = (array.astype(mx.float32) - before.astype(mx.float32) for array in (one, other))
    return scalar(mx.abs(one - other).mean()) <= _EXACT_ENOUGH * scalar(mx.abs(other).mean())


def _alike(one: mx.array, other: mx.array) -> bool:
    one, other = one.astype(mx.float32), other.astype(mx.float32)
    return scalar(mx.abs(one - other).max()) <= _EXACT_ENOUGH * scalar(mx.abs(other).max())


def _owner_of_layers(model: nn.Module) -> tuple[nn.Module, str, str]:
    """The module that holds the list of layers, the list's name in it, and in the model: `layers`, `model.layers`."""
    layers = getattr(model, "layers", None)
    if not isinstance(layers, list) or not layers or not all(isinstance(layer, nn.Module) for layer in layers):
        raise CannotCutError(f"{type(model).__name__} has no list of layers")
    for path, module in model.named_modules():
        for name, own in module.items():
            if isinstance(own, list) and len(own) == len(layers) and own[0] is layers[0]:
                return module, name, f"{path}.{name}" if path else name
    raise CannotCutError(f"{type(model).__name__} keeps its layers in several places")


def trained_by_layer(anatomy: Anatomy, parameters: Any) -> tuple[dict[str, mx.array], list[dict[str, mx.array]]]:
    """Parameters by the place that they are used in: outside of the layers, by whole names; in each, by its own."""
    outside: dict[str, mx.array] = {}
    inside: list[dict[str, mx.array]] = [{} for _ in anatomy.layers]
    prefix = f"{anatomy.path}."
    for name, array in tree_flatten(parameters):
        if name.startswith(prefix):
            index, _, rest = name.removeprefix(prefix).partition(".")
            inside[int(index)][rest] = array
        else:
            outside[name] = array
    return outside, inside
