"""Power retention (arXiv 2507.04239): attention whose weight is a power, so that it is also a recurrence.

With the scale s, the log gates log g and their running sum G, and an even power p:

- attention form: y_i = Σ_{j≤i} A_ij v_j / Σ_{j≤i} A_ij with A_ij = (s q_i·k_j)^p exp(G_i − G_j);
- recurrent form: S_t = g_t S_{t−1} + φ(k_t) v_tᵀ, z_t = g_t z_{t−1} + φ(k_t), y_t = φ(s q_t)ᵀS_t / φ(s q_t)ᵀz_t;
- chunked form: the attention form inside a chunk, the recurrent form from chunk to chunk.

φ holds the products of p entries of a vector, so that φ(q)·φ(k) = (q·k)^p. The state is one array
[batch, kv_heads, features, value_dim + 1] in at least float32: S, with z as its last column, because a column of ones
beside v makes the normaliser come along.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from math import e, factorial, prod
from typing import Literal, overload

from engine.backend import mx
from engine.ops.recompute import recomputed, split

EPSILON = 1e-6
"""Added to the normaliser of an even power."""

LARGEST_HEAD_DIM_OF_POWER_4 = 16
"""Beyond it the state of power 4 is too large to be worth keeping; only the attention form is left."""

_SMALLEST_LOG_GATE = -50.0
"""Stands for every stronger decay (exp(−50) = 2e-22): differences of −inf would be NaN."""

_BLOCK = 32
"""Tokens whose decays from one to another are computed one by one: fewer are fewer exponentials, but more products."""

_TILE = {1: 1, 2: 8, 4: 2}
"""Entries that are multiplied out at once, by power: wider is fewer operations, but more features that are equal."""


@overload
def power_retention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    log_g: mx.array | None = None,
    *,
    power: int = 2,
    scale: float | None = None,
    chunk_size: int = 128,
    switch_over: int = 1024,
    initial_state: mx.array | None = None,
    return_state: Literal[False] = False,
) -> mx.array: ...


@overload
def power_retention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    log_g: mx.array | None = None,
    *,
    power: int = 2,
    scale: float | None = None,
    chunk_size: int = 128,
    switch_over: int = 1024,
    initial_state: mx.array | None = None,
    return_state: Literal[True],
) -> tuple[mx.array, mx.array]: ...


def power_retention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    log_g: mx.array | None = None,
    *,
    power: int = 2,
    scale: float | None = None,
    chunk_size: int = 128,
    switch_over: int = 1024,
    initial_state: mx.array | None = None,
    return_state: bool = False,
) -> mx.array | tuple[mx.array, mx.array]:
    """Causal power retention over a sequence of any length.

    Up to `switch_over` tokens in the attention form (quadratic in time), beyond it in chunks of `chunk_size` tokens, in
    order, each recomputed in the backward pass (linear in time and memory). Both give the same numbers.

    Args:
        q: [batch, heads, time, head_dim].
        k: [batch, kv_heads, time, head_dim]; kv_heads divides heads.
        v: [batch, kv_heads, time, value_dim].
        log_g: logarithm of the gates, at most 0, [batch, kv_heads, time]; no decay if absent.
        power: 1, 2 or 4. Power 1 divides by max(|z|, 1), because its normaliser z can cross zero.
        scale: multiplies q·k; 1/√head_dim if absent.
        initial_state: what `return_state` gave for the tokens before these, [batch, kv_heads, features, value_dim + 1].
        return_state: also return the state after the last token.

    Returns:
        y [batch, heads, time, value_dim] in v's dtype, or (y, state).

    Raises:
        ValueError: shapes or options do not fit, or a state of power 4 is asked for with head_dim > 16.
    """
    _check_options(power, chunk_size, switch_over)
    _check_shapes(q, k, v, log_g)
    batch, heads, time, head_dim = q.shape
    kv_heads, value_dim = v.shape[1], v.shape[3]
    if initial_state is not None or return_state:
        _check_state((batch, kv_heads), head_dim, value_dim, power, initial_state)
    scale = head_dim**-0.5 if scale is None else scale

    if time == 0:
        y = mx.zeros((batch, heads, 0, value_dim), dtype=v.dtype)
        nothing = mx.zeros((batch, kv_heads, state_features(head_dim, power), value_dim + 1), _sum_dtype(q, k, v))
        return (y, nothing if initial_state is None else initial_state) if return_state else y

    chunked = time > switch_over and _has_state(power, head_dim)
    cuts = list(range(chunk_size, time, chunk_size)) if chunked else []
    sequences = [q.reshape(batch, kv_heads, heads // kv_heads, time, head_dim), k, v]
    pieces = [split(sequence, cuts, axis=-2) for sequence in sequences]
    if log_g is not None:
        pieces.append(split(log_g, cuts, axis=-1))

    outputs: list[mx.array] = []
    state = initial_state
    for index, chunk in enumerate(zip(*pieces, strict=True)):
        function = _chunk_function(
            power=power,
            scale=scale,
            gated=log_g is not None,
            reads_state=state is not None,
            writes_state=return_state or index < len(cuts),
        )
        run = recomputed(function) if chunked else function
        y, *new_state = run(*chunk, *([] if state is None else [state]))
        outputs.append(y)
        state = new_state[0] if new_state else None
    y = mx.concatenate(outputs, axis=-2).reshape(batch, heads, time, value_dim)
    return (y, state) if return_state and state is not None else y


def retention_step(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    log_g: mx.array | None = None,
    state: mx.array | None = None,
    *,
    power: int = 2,
    scale: float | None = None,
) -> tuple[mx.array, mx.array]:
    """The recurrent form for one token: the same cost whatever came before.

    Args:
        q: [batch, heads, head_dim].
        k: [batch, kv_heads, head_dim].
        v: [batch, kv_heads, value_dim].
        log_g: [batch, kv_heads].
        state: as in `power_retention`; absent at the first token.

    Returns:
        (y [batch, heads, value_dim] in v's dtype, the new state).

    Raises:
        ValueError: shapes or options do not fit, or power is 4 with head_dim > 16.
    """
    if q.ndim != 3 or k.ndim != 3 or v.ndim != 3 or (log_g is not None and log_g.ndim != 2):
        raise ValueError("one token is q, k, v of [batch, heads, size] and log_g of [batch, kv_heads]")
    _check_options(power)
    _check_shapes(q[:, :, None], k[:, :, None], v[:, :, None], None if log_g is None else log_g[:, :, None])
    batch, heads, head_dim = q.shape
    kv_heads, value_dim = v.shape[1:]
    _check_state((batch, kv_heads), head_dim, value_dim, power, state)
    dtype = _sum_dtype(q, k, v)
    queries = q.astype(dtype) * (head_dim**-0.5 if scale is None else scale)
    values = _with_ones(v.astype(dtype))
    new = _weights(head_dim, power, dtype) * (_products(k.astype(dtype), power)[..., None] * values[..., None, :])
    if state is not None:
        new = new + (state if log_g is None else _exp(_gates(log_g, dtype))[..., None, None] * state)
    sums = _products(queries.reshape(batch, kv_heads, -1, head_dim), power) @ new
    return _normalised(sums, power).astype(v.dtype).reshape(batch, heads, value_dim), new


def state_features(head_dim: int, power: int) -> int:
    """Rows of the state: the length of φ of a vector of `head_dim` entries."""
    return sum(_tile_lengths(head_dim, _TILE[power], power))


def _chunk_function(
    *, power: int, scale: float, gated: bool, reads_state: bool, writes_state: bool
) -> Callable[..., list[mx.array]]:
    """One chunk: attention inside, and the state for what came before, where there is one.

    The function takes q [batch, kv_heads, heads / kv_heads, time, head_dim], k, v, then log_g and the state if it has
    them, and returns y as q with value_dim, then the new state if asked for.
    """

    def chunk(*arrays: mx.array) -> list[mx.array]:
        q, k, v = arrays[:3]
        dtype = _sum_dtype(q, k, v)
        queries, keys, values = q.astype(dtype) * scale, k.astype(dtype), _with_ones(v.astype(dtype))
        if gated:
            decay = mx.cumsum(_gates(arrays[3], dtype), axis=-1)
            last = decay[..., -1:]
            queries, keys, decay = _with_gradient_of(decay, queries, keys, power)
            sums = _decayed_sums(queries, keys, values, decay, power)
        else:
            sums = _sums(queries, keys, values, power)

        if reads_state:
            before = (_products(queries, power).flatten(-3, -2) @ arrays[-1]).reshape(sums.shape)
            sums = sums + (before * _exp(decay)[..., None, :, None] if gated else before)
        y = _normalised(sums, power).astype(v.dtype)
        if not writes_state:
            return [y]

        if gated:
            values = values * _exp(last - decay)[..., None]
        added = _products(keys, power).swapaxes(-1, -2) @ values
        state = added * _weights(q.shape[-1], power, dtype)
        if reads_state:
            state = state + (arrays[-1] * _exp(last)[..., None] if gated else arrays[-1])
        return [y, state]

    return chunk


def _sums(queries: mx.array, keys: mx.array, values: mx.array, power: int) -> mx.array:
    """Σ_{j≤i} (q_i·k_j)^p v_j, for queries [batch, kv_heads, group, time, head_dim]."""
    group, time = queries.shape[-3:-1]
    scores = _power(queries.flatten(-3, -2) @ keys.swapaxes(-1, -2), power)
    scores = mx.where(mx.tri(time, dtype=mx.bool_), mx.unflatten(scores, -2, (group, time)), 0)
    return mx.unflatten(scores.flatten(-3, -2) @ values, -2, (group, time))


def _decayed_sums(queries: mx.array, keys: mx.array, values: mx.array, decay: mx.array, power: int) -> mx.array:
    """Σ_{j≤i} (q_i·k_j)^p exp(G_i − G_j) v_j.

    With B the last token before i's block, exp(G_i − G_j) = exp(G_i − G_B) exp(G_B − G_j) for every j before the block,
    and neither factor can overflow. So time² exponentials, most of the cost on a CPU, are needed inside blocks only.
    """
    time, block = keys.shape[-2], min(_BLOCK, keys.shape[-2])
    if short := -time % block:  # rows of zeros at the end change nothing
        queries, keys, values = (_padded(array, short, axis=-2) for array in (queries, keys, values))
        decay = _padded(decay, short, axis=-1)
    blocks = (time + short) // block
    within = mx.unflatten(decay, -1, (blocks, block))
    own_queries, own_keys, own_values = (mx.unflatten(array, -2, (blocks, block)) for array in (queries, keys, values))

    # Masked before the exponential, which could overflow above the diagonal.
    causal = mx.tri(block, dtype=mx.bool_)
    shares = _exp(mx.where(causal, within[..., :, None] - within[..., None, :], -mx.inf))
    scores = _power(own_queries @ own_keys[..., None, :, :, :].swapaxes(-1, -2), power)
    sums = (scores * shares[..., None, :, :, :]) @ own_values[..., None, :, :, :]
    if blocks > 1:
        start = mx.concatenate([mx.zeros_like(within[..., :1, -1]), within[..., :-1, -1]], axis=-1)[..., None]
        earlier = mx.arange(time + short) < block * mx.arange(blocks)[:, None]
        shares = _exp(mx.where(earlier, start - decay[..., None, :], -mx.inf))
        scores = _power(queries.flatten(-3, -2) @ keys.swapaxes(-1, -2), power)
        scores = mx.unflatten(scores, -2, own_queries.shape[-4:-1]) * shares[..., None, :, None, :]
        before = (scores.flatten(-4, -2) @ values).reshape(sums.shape)
        sums = sums + before * _exp(within - start)[..., None, :, :, None]
    return sums.flatten(-3, -2)[..., :time, :]


def _with_gradient_of(
    decay: mx.array, queries: mx.array, keys: mx.array, power: int
) -> tuple[mx.array, mx.array, mx.array]:
    """Moves the gradient of the decays G into queries and keys, where it costs time instead of time².

    (q_i·k_j)^p exp(G_i − G_j) depends on G as it does on a factor exp(G_i / p) of q_i and exp(−G_j / p) of k_j. Here
    the factors are 1, with the derivatives of those; the decays themselves are returned without a gradient.
    """
    fixed = mx.stop_gradient(decay)
    change = ((decay - fixed) / power)[..., None]
    return queries * (1 + change[..., None, :, :]), keys * (1 - change), fixed


def _padded(array: mx.array, count: int, axis: int) -> mx.array:
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, count)
    return mx.pad(array, widths)


def _sum_dtype(*arrays: mx.array) -> mx.Dtype:
    return mx.float64 if any(array.dtype == mx.float64 for array in arrays) else mx.float32


def _gates(log_g: mx.array, dtype: mx.Dtype) -> mx.array:
    return mx.maximum(log_g.astype(dtype), _SMALLEST_LOG_GATE)


def _exp(x: mx.array) -> mx.array:
    # MLX's exp of a float64 is no better than float32's; its power is.
    return mx.power(mx.array(e, dtype=x.dtype), x) if x.dtype == mx.float64 else mx.exp(x)


def _with_ones(v: mx.array) -> mx.array:
    return mx.concatenate([v, mx.ones((*v.shape[:-1], 1), dtype=v.dtype)], axis=-1)


def _power(x: mx.array, power: int) -> mx.array:
    if power == 1:
        return x
    squared = x * x
    return squared if power == 2 else squared * squared


def _normalised(sums: mx.array, power: int) -> mx.array:
    """The sums over v, divided by their last column."""
    normaliser = sums[..., -1:]
    if power == 1:
        return sums[..., :-1] / mx.maximum(mx.abs(normaliser), 1)
    # Never negative in theory; read from a state it can be, by rounding.
    return sums[..., :-1] / (mx.maximum(normaliser, 0) + EPSILON)


def _products(x: mx.array, power: int) -> mx.array:
    """φ without its weights: products of `power` entries of x [..., head_dim], as [..., features].

    An entry is multiplied by the products of one entry less that begin with its own tile or a later one; these lie at
    the end, because products are ordered by the tile that they begin with.
    """
    head_dim, tile = x.shape[-1], _TILE[power]
    products = x
    for degree in range(1, power):
        blocks = []
        for first, start in zip(range(0, head_dim, tile), _tile_starts(head_dim, tile, degree), strict=True):
            block = x[..., first : first + tile, None] * products[..., None, start:]
            blocks.append(block.flatten(-2))
        products = mx.concatenate(blocks, axis=-1)
    return products


@lru_cache
def _tile_starts(head_dim: int, tile: int, degree: int) -> tuple[int, ...]:
    """For each tile, where the products of `degree` entries that begin with it start."""
    lengths = _tile_lengths(head_dim, tile, degree)
    return tuple(sum(lengths[:index]) for index in range(len(lengths)))


def _tile_lengths(head_dim: int, tile: int, degree: int) -> list[int]:
    """For each tile, how many products of `degree` entries begin with it."""
    widths = [min(tile, head_dim - first) for first in range(0, head_dim, tile)]
    lengths = widths
    for _ in range(1, degree):
        lengths = [width * sum(lengths[index:]) for index, width in enumerate(widths)]
    return lengths


def _weights(head_dim: int, power: int, dtype: mx.Dtype) -> mx.array:
    """[features, 1]: the weights of φ(q) and of φ(k) together, so that they are applied once, to the state."""
    return mx.array(_weight_table(head_dim, power), dtype=dtype)[:, None]


@lru_cache
def _weight_table(head_dim: int, power: int) -> tuple[float, ...]:
    """How often each product occurs in (Σ q_a k_a)^power, over how many features hold that same product."""
    tile = _TILE[power]
    entries = range(head_dim)
    features: list[tuple[int, ...]] = [(entry,) for entry in entries]
    for _ in range(1, power):
        features = [
            (entry, *rest)
            for first in range(0, head_dim, tile)
            for entry in entries[first : first + tile]
            for rest in features
            if rest[0] // tile >= first // tile
        ]
    multisets = [tuple(sorted(feature)) for feature in features]
    copies: dict[tuple[int, ...], int] = {}
    for multiset in multisets:
        copies[multiset] = copies.get(multiset, 0) + 1
    return tuple(_orderings(multiset) / copies[multiset] for multiset in multisets)


def _orderings(multiset: Sequence[int]) -> int:
    return factorial(len(multiset)) // prod(factorial(multiset.count(entry)) for entry in set(multiset))


def _has_state(power: int, head_dim: int) -> bool:
    return power < 4 or head_dim <= LARGEST_HEAD_DIM_OF_POWER_4


def _check_options(power: int, chunk_size: int = 1, switch_over: int = 0) -> None:
    if power not in (1, 2, 4):
        raise ValueError(f"power = {power}: should be 1, 2 or 4")
    if chunk_size < 1:
        raise ValueError(f"chunk_size = {chunk_size}: should be at least 1")
    if switch_over < 0:
        raise ValueError(f"switch_over = {switch_over}: should be at least 0")


def _check_shapes(q: mx.array, k: mx.array, v: mx.array, log_g: mx.array | None) -> None:
    for name, array in (("q", q), ("k", k), ("v", v)):
        if array.ndim != 4:
            raise ValueError(f"{name} has shape {array.shape}: should be [batch, heads, time, head_dim]")
        if not mx.issubdtype(array.dtype, mx.floating):
            raise ValueError(f"{name} is {array.dtype}: should be floating point")
    batch, heads, time, head_dim = q.shape
    kv_heads = k.shape[1]
    if k.shape != (batch, kv_heads, time, head_dim):
        raise ValueError(f"k has shape {k.shape}: should be {(batch, kv_heads, time, head_dim)}, as q has {q.shape}")
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"q has {heads} heads, which is not a multiple of the {kv_heads} of k and v")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v has shape {v.shape}: should begin with {k.shape[:3]}, as k does")
    if log_g is not None and log_g.shape != k.shape[:3]:
        raise ValueError(f"log_g has shape {log_g.shape}: should be [batch, kv_heads, time] = {k.shape[:3]}")


def _check_state(outer: tuple[int, int], head_dim: int, value_dim: int, power: int, state: mx.array | None) -> None:
    if not _has_state(power, head_dim):
        raise ValueError(f"power 4 keeps a state for head_dim <= {LARGEST_HEAD_DIM_OF_POWER_4} only, not {head_dim}")
    shape = (*outer, state_features(head_dim, power), value_dim + 1)
    if state is not None and state.shape != shape:
        raise ValueError(
            f"the state has shape {state.shape}: should be {shape} [batch, kv_heads, features, values + 1]"
        )
