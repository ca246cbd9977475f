"""Forward and backward one half-layer at a time: the least memory, known beforehand, at the same gradients.

Forward, each layer keeps nothing but its input. The head makes loss and slopes in chunks of tokens. Then from the top
down each half is computed again and its gradients made: the MLP in chunks of tokens, attention sequence by sequence.
What is alive at once is what one such piece needs. Short pieces also suit Metal's watchdog, and let others be served
between layers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engine.backend import mx, on_gpu, scalar
from engine.models.anatomy import Arguments, CannotCutError, Half, trained_by_layer
from engine.models.moulds import build_of, join_arguments, split_arguments
from engine.ops.dropout import KeyedDropout
from engine.ops.losses import cross_entropy_sum, tokens_at_once

import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

if TYPE_CHECKING:
    from engine.backward import Pulse, Sums
    from engine.tasks import Batch, Task

FORWARD_TOKENS, BACKWARD_TOKENS = 4096, 1024
"""Of a half at once: tokens of an MLP, or as many whole sequences as have so many, but one at least. Forward they need
less memory each, and the fewer pieces, the less is lost between them."""

Flat = dict[str, mx.array]


@dataclass(frozen=True)
class _Part:
    """A half of a layer, the names of its weights that are trained, and its other weights."""

    half: Half
    trained: tuple[str, ...]
    frozen: tuple[tuple[str, mx.array], ...]


@dataclass(frozen=True)
class _Layer:
    """Layers of one `mould` differ in their arrays alone: one compiled function does for all of them."""

    parts: tuple[_Part, ...]
    mould: int


class Layerwise:
    """See `engine.backward.Backward`. Raises `CannotCutError` where the model cannot be cut, and says why.

    `compiled` for GPUs: the functions of a layer are compiled once for all that are alike.
    """

    def __init__(self, task: Task, dtype: mx.Dtype, compiled: bool) -> None:
        if task.anatomy is None:
            raise CannotCutError("it is no stack of layers")
        self._task, self._anatomy, self._dtype, self._compiled = task, task.anatomy, dtype, compiled
        self._model = task.model
        self._model.eval()
        # Dropout's masks go by the piece, and must be the same both ways.
        self._drops = any(isinstance(m, KeyedDropout) and m.rate > 0 for _, m in self._model.named_modules())
        self._outside, inside = trained_by_layer(self._anatomy, self._model.trainable_parameters())
        pairs = self._anatomy.check()
        self._layers: list[_Layer] = []
        self._moulds: list[nn.Module] = []
        builds: dict[Any, int] = {}
        for module, pair, trained in zip(self._anatomy.layers, pairs, inside, strict=True):
            frozen = [(name, array) for name, array in tree_flatten(module.parameters()) if name not in trained]
            parts = tuple(
                _Part(half, tuple(filter(half.uses, trained)), tuple(item for item in frozen if half.uses(item[0])))
                for half in pair
            )
            build = (build_of(module), tuple(trained)) if compiled else len(builds)
            if build not in builds:
                builds[build] = len(self._moulds)
                self._moulds.append(module)
            self._layers.append(_Layer(parts, builds[build]))
        self._functions: dict[Any, Callable[..., Any]] = {}
        self._under_way: list[mx.array] = []

    def gradients(self, parameters: Any, batch: Batch, seed: int, previous: Sums | None, pulse: Pulse) -> Sums:
        self._model.train()
        names = [name for name, _ in tree_flatten(parameters)]
        sums = self._first_sums(parameters) if previous is None else dict(tree_flatten(previous[1]))
        loss = mx.array(0.0) if previous is None else previous[0]
        del previous
        outside, inside = self._by_layer(parameters)
        tokens, targets, counted = self._task.predicting(*batch.arrays)
        lowest = 0 if outside else next(index for index, trained in enumerate(inside) if trained)

        with self._wearing(outside):
            hidden, arguments = self._anatomy.enter(tokens)
        kept: list[mx.array] = []
        for index, given in enumerate(arguments):
            if index >= lowest:
                kept.append(hidden)
            hidden = self._forward(index, inside[index], hidden, given, seed)
            self._serve(pulse)
        loss, slopes = self._head(outside, hidden, targets, counted, loss, sums)
        del hidden
        for index in reversed(range(lowest, len(self._layers))):
            wanted = index > lowest or bool(outside)
            slopes = self._backward(index, inside[index], kept.pop(), slopes, arguments[index], seed, wanted, sums)
            self._serve(pulse)
        if outside:
            self._embedding(outside, tokens, slopes, sums)
        self._settle()
        mx.eval(loss, sums)
        return loss, tree_unflatten([(name, sums[name]) for name in names])

    def loss(self, parameters: Any, batch: Batch, pulse: Pulse) -> float:
        training = self._model.training
        self._model.eval()
        try:
            return self._measure(parameters, batch, pulse)
        finally:
            self._model.train(training)  # gradients may be under way: a validation can be asked for between layers

    def _measure(self, parameters: Any, batch: Batch, pulse: Pulse) -> float:
        outside, inside = self._by_layer(parameters)
        tokens, targets, counted = self._task.predicting(*batch.arrays)
        with self._wearing(outside):
            hidden, arguments = self._anatomy.enter(tokens)
        for index, given in enumerate(arguments):
            hidden = self._forward(index, inside[index], hidden, given, 0)
            self._serve(pulse)
        loss = mx.array(0.0)
        for rows, ids, mask in self._chunks(hidden, targets, counted):
            loss = self._function("loss", self._loss_of_chunk)(list(outside.values()), rows, ids, mask, loss)
            self._launch([loss])
        self._settle()
        return scalar(loss)

    # A layer

    def _forward(self, index: int, trained: Flat, hidden: mx.array, given: Arguments, seed: int) -> mx.array:
        for number in range(len(self._layers[index].parts)):
            hidden = self._half_forward(index, number, trained, hidden, given, seed)
        return hidden

    def _half_forward(
        self, index: int, number: int, trained: Flat, hidden: mx.array, given: Arguments, seed: int
    ) -> mx.array:
        layer, (extras, still) = self._layers[index], split_arguments(given)
        part = layer.parts[number]

        def run(
            weights: list[mx.array], frozen: list[mx.array], x: mx.array, extras: list[mx.array], key: mx.array
        ) -> mx.array:
            return self._run(layer, part, weights, frozen, x, extras, still, key)

        function = self._function(("forward", layer.mould, number, self._model.training, still), run)
        weights, frozen = [trained[name] for name in part.trained], self._frozen(part)
        done = []
        size = BACKWARD_TOKENS if self._model.training and self._drops else FORWARD_TOKENS
        for place, x in enumerate(_pieces(part.half, hidden, size)):
            done.append(function(weights, frozen, x, extras, _key(seed, index, number, place)))
            self._launch([done[-1]])
        return _joined(part.half, done, hidden.shape)

    def _backward(
        self,
        index: int,
        trained: Flat,
        hidden: mx.array,
        slopes: mx.array,
        given: Arguments,
        seed: int,
        wanted: bool,
        sums: Flat,
    ) -> mx.array:
        """The slopes by a layer's input (where they are `wanted`) from those by its output; adds to `sums`."""
        parts = self._layers[index].parts
        inputs = [hidden]
        for number in range(len(parts) - 1):
            inputs.append(self._half_forward(index, number, trained, inputs[-1], given, seed))
        del hidden
        for number in reversed(range(len(parts))):
            below = wanted or any(part.trained for part in parts[:number])
            if below or parts[number].trained:
                slopes = self._half_backward(index, number, trained, inputs.pop(), slopes, given, seed, below, sums)
        return slopes

    def _half_backward(
        self,
        index: int,
        number: int,
        trained: Flat,
        hidden: mx.array,
        slopes: mx.array,
        given: Arguments,
        seed: int,
        wanted: bool,
        sums: Flat,
    ) -> mx.array:
        layer, (extras, still) = self._layers[index], split_arguments(given)
        part = layer.parts[number]

        def gradients(
            weights: list[mx.array],
            frozen: list[mx.array],
            x: mx.array,
            slopes: mx.array,
            extras: list[mx.array],
            key: mx.array,
            sums: list[mx.array],
        ) -> tuple[mx.array, list[mx.array]]:
            def run(*primals: mx.array) -> list[mx.array]:
                own, weights = (primals[0], primals[1:]) if wanted else (x, primals)
                return [self._run(layer, part, list(weights), frozen, own, extras, still, key)]

            _, parts = mx.vjp(run, [*([x] if wanted else []), *weights], [slopes])
            to_input, to_trained = (parts[0], parts[1:]) if wanted else (slopes, parts)
            return to_input, [old + new for old, new in zip(sums, to_trained, strict=True)]

        function = self._function(("backward", layer.mould, number, wanted, still), gradients)
        names = [f"{self._anatomy.path}.{index}.{name}" for name in part.trained]
        weights, frozen = [trained[name] for name in part.trained], self._frozen(part)
        pairs = zip(*(_pieces(part.half, array, BACKWARD_TOKENS) for array in (hidden, slopes)), strict=True)
        done = []
        for place, (x, slope) in enumerate(pairs):
            key, added = _key(seed, index, number, place), [sums[name] for name in names]
            result, added = function(weights, frozen, x, slope, extras, key, added)
            sums.update(zip(names, added, strict=True))
            self._launch([*([result] if wanted else []), *added])
            done.append(result)
        return _joined(part.half, done, hidden.shape)

    def _run(
        self,
        layer: _Layer,
        part: _Part,
        weights: list[mx.array],
        frozen: list[mx.array],
        x: mx.array,
        extras: list[mx.array],
        still: Any,
        key: mx.array,
    ) -> mx.array:
        """A half of a layer with these weights, on the module that stands for all of its kind."""
        self._task.keys.begin(key)
        given = join_arguments(still, extras)
        arrays = self._cast(zip(part.trained, weights, strict=True))
        if frozen:
            arrays += [(name, array) for (name, _), array in zip(part.frozen, frozen, strict=True)]
        with _dressed(self._moulds[layer.mould], arrays) as module:
            return part.half.run(module, x, *given.positional, **dict(given.named))

    def _frozen(self, part: _Part) -> list[mx.array]:
        """What a compiled function has to be told of a layer; its own module knows by itself."""
        return [array for _, array in part.frozen] if self._compiled else []

    # What comes before and after

    def _head(
        self, outside: Flat, hidden: mx.array, targets: mx.array, counted: mx.array, loss: mx.array, sums: Flat
    ) -> tuple[mx.array, mx.array]:
        """Adds the loss and its gradients; the slopes by what the last layer has handed on."""
        slopes = []
        function = self._function("head", self._gradients_of_chunk)
        for rows, ids, mask in self._chunks(hidden, targets, counted):
            added = [sums[name] for name in outside]
            loss, to_rows, added = function(list(outside.values()), rows, ids, mask, loss, added)
            sums.update(zip(outside, added, strict=True))
            self._launch([loss, to_rows, *added])
            slopes.append(to_rows)
        return loss, mx.concatenate(slopes).reshape(hidden.shape)

    def _chunks(
        self, hidden: mx.array, targets: mx.array, counted: mx.array
    ) -> Iterator[tuple[mx.array, mx.array, mx.array]]:
        rows, ids, mask = hidden.flatten(0, 1), targets.flatten(), counted.flatten()
        size = tokens_at_once(self._task.vocabulary, on_gpu())
        for start in range(0, rows.shape[0], size):
            end = start + size
            yield rows[start:end], ids[start:end], mask[start:end]

    def _loss_of_chunk(
        self, outside: list[mx.array], rows: mx.array, ids: mx.array, mask: mx.array, loss: mx.array
    ) -> mx.array:
        with self._wearing(dict(zip(self._outside, outside, strict=True))):
            return loss + cross_entropy_sum(self._anatomy.leave(rows[None])[0], ids, mask)

    def _gradients_of_chunk(
        self,
        outside: list[mx.array],
        rows: mx.array,
        ids: mx.array,
        mask: mx.array,
        loss: mx.array,
        sums: list[mx.array],
    ) -> tuple[mx.array, mx.array, list[mx.array]]:
        def run(rows: mx.array, *outside: mx.array) -> list[mx.array]:
            return [self._loss_of_chunk(list(outside), rows, ids, mask, mx.array(0.0))]

        (own,), (to_rows, *parts) = mx.vjp(run, [rows, *outside], [mx.array(1.0)])
        return loss + own, to_rows, [old + new for old, new in zip(sums, parts, strict=True)]

    def _embedding(self, outside: Flat, tokens: mx.array, slopes: mx.array, sums: Flat) -> None:
        def run(*arrays: mx.array) -> list[mx.array]:
            with self._wearing(dict(zip(outside, arrays, strict=True))):
                return [self._anatomy.enter(tokens)[0]]

        _, parts = mx.vjp(run, list(outside.values()), [slopes])
        sums.update({name: sums[name] + part for name, part in zip(outside, parts, strict=True)})

    # Weights, functions, pace

    def _by_layer(self, parameters: Any) -> tuple[Flat, list[Flat]]:
        """See `trained_by_layer`; in one order, because trees that were loaded or exchanged may be in another."""
        outside, inside = trained_by_layer(self._anatomy, parameters)
        return {name: outside[name] for name in self._outside}, inside

    @contextlib.contextmanager
    def _wearing(self, outside: Flat) -> Iterator[None]:
        with _dressed(self._model, self._cast(outside.items())):
            yield

    def _cast(self, arrays: Any) -> list[tuple[str, mx.array]]:
        return [(name, array.astype(self._dtype)) for name, array in arrays]

    def _first_sums(self, parameters: Any) -> Flat:
        return {name: mx.zeros(array.shape, dtype=mx.float32) for name, array in tree_flatten(parameters)}

    def _function(self, name: Any, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function of that name, compiled the first time where that pays."""
        if not self._compiled:
            return function
        if name not in self._functions:
            self._functions[name] = mx.compile(function)
        return self._functions[name]

    def _launch(self, arrays: list[mx.array]) -> None:
        """Starts to compute, and waits for what was started before: two pieces at most are under way."""
        before, self._under_way = self._under_way, []  # where it fails, nothing of it is kept
        mx.async_eval(arrays)
        mx.eval(before)
        self._under_way = arrays

    def _settle(self) -> None:
        before, self._under_way = self._under_way, []
        mx.eval(before)

    def _serve(self, pulse: Pulse) -> None:
        """Lets others be served; where that ends the micro-batch, nothing of it is kept."""
        try:
            pulse()
        except BaseException:
            self._under_way = []
            raise


def _pieces(half: Half, hidden: mx.array, tokens: int) -> list[mx.array]:
    """Hidden states [batch, time, width] as a half takes them: chunks of tokens, or of sequences."""
    batch, time, width = hidden.shape
    if half.by_token:
        flat = hidden.reshape(1, batch * time, width)
        return [flat[:, start : start + tokens] for start in range(0, batch * time, tokens)]
    at_once = max(1, tokens // time)
    return [hidden[start : start + at_once] for start in range(0, batch, at_once)]


def _joined(half: Half, pieces: Sequence[mx.array], shape: tuple[int, ...]) -> mx.array:
    if len(pieces) == 1:
        return pieces[0].reshape(shape)
    return mx.concatenate(list(pieces), axis=1 if half.by_token else 0).reshape(shape)


@contextlib.contextmanager
def _dressed(module: nn.Module, arrays: list[tuple[str, mx.array]]) -> Iterator[nn.Module]:
    """A module with other weights; afterwards it has its own again."""
    if not arrays:
        yield module
        return
    own = module.parameters()
    module.update(tree_unflatten(arrays))
    try:
        yield module
    finally:
        module.update(own)


def _key(seed: int, *place: int) -> mx.array:
    """A random key for a place in a model: the same whenever that is computed again."""
    for part in place:
        seed = (seed * 6364136223846793005 + part + 1442695040888963407) % (1 << 63)
    return mx.random.key(seed)
