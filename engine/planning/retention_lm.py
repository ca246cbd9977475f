"""The memory and the operations of a step of a power-retention language model.

Which arrays a step keeps follows from reading `engine.update`, `engine.models`, `engine.ops`. How many more are alive
while a layer's gradients are made depends on how far MLX runs ahead of the device, because an array's memory is taken
when its operation is queued. Those few factors are measured (MLX 0.32 on CPU, float32; 170 shapes, from one layer to
twelve, 64 to 1,024 tokens, vocabularies of 300 to 100,000): tests/benchmarks/plan_accuracy.py shows how well they hold.

On GPUs (bfloat16 beside float32 weights, compiled) fewer arrays are made, because elementwise operations are fused, but
more are alive, because command buffers in flight hold them (`engine.planning.in_flight`). Those factors are measured
with MLX 0.32 on an H200, 110 shapes; with buffers of 64 and of 50 "MB", about as large as Metal's own. Where a step
takes milliseconds, the peak depends on who is faster, host or GPU, and differs by a fifth and more between steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.layerwise import BACKWARD_TOKENS
from engine.models.retention_lm import RetentionLMConfig
from engine.ops.losses import LOGITS_AT_ONCE, tokens_at_once
from engine.ops.power_retention import LARGEST_HEAD_DIM_OF_POWER_4, state_features
from engine.planning import (
    ACTIVATIONS,
    CHECKPOINTING,
    COPIES,
    DATA,
    GRADIENTS,
    IN_MLX,
    LAYERWISE,
    LOGITS,
    OPTIMIZER,
    STATES,
    TRAINED,
    UPDATE,
    Moment,
    Saving,
    Setting,
    micro_batch,
    micro_batches,
)
from engine.planning.alive import ON_CPU, ON_GPU
from engine.planning.in_flight import BUFFERS, arrays_read, buffer_numbers, in_flight_bytes
from engine.profile import Profile, RetentionProfile
from engine.profile_retention import RetentionModel

_BLOCK = 32
"""Tokens of a block of the attention form, as in `engine.ops.power_retention`."""

_LOGITS_ALIVE = 4
"""Arrays as large as a chunk's logits: logits, exponentials, slopes, and slopes less the one-hot targets."""

_FULL_CHUNKS_AHEAD, _HALF_CHUNKS_AHEAD = 1, 1
"""On CPU MLX queues about fifty operations, two and a half chunks of the loss: the second one has all its arrays
already, the third a half of them."""

_LOGITS_MADE, _LOGITS_READ = 5, 12
"""GPU: arrays of float32 as large as a chunk's logits that it makes in all (logits and slopes once more as half a one,
in bfloat16), and how often one of them is read: that decides how many chunks are in flight."""

_MLP_GRADIENTS = 6.0
"""Arrays of the MLP's inner size while its gradients are made: those of its five, and one ahead."""

_SCORE_GRADIENTS, _BLOCK_GRADIENTS, _WIDE_GRADIENTS = 2.65, 6.5, 10.6
"""Attention form: arrays of scores, of scores inside blocks, and of the width while the op's gradients are made."""

_FEATURE_GRADIENTS, _CHUNK_SCORE_GRADIENTS, _CHUNKED_WIDE_GRADIENTS = 4.6, 0.9, 9.7
"""Chunked form, the same: arrays of the expanded queries and of the scores of one chunk, and of the width."""

_INNER_KEPT, _INNER_KEPT_FUSED = 5.0, 3.0
"""Arrays of the MLP's inner size that are kept: gate, up, sigmoid, silu, product; fused on GPUs: gate, up, product."""

_FUSED_GRADIENTS = 0.4
"""GPU, attention form: what making a layer's gradients takes beside, as a share of what the layer has kept. As much as
the rest again, all that it kept, may be in flight."""

_CHUNK_GRADIENTS, _CHUNK_IN_FLIGHT = 4.6, 5.4
"""GPU, chunked form: arrays of one chunk's expanded queries and scores, alive, and more of them in flight."""

_RECOMPUTED_AHEAD = 1.15
"""With gradient checkpointing the recomputation of the next layer begins a little before a layer is done."""

_FORWARD_LEFT = 0.8
"""Of the last layer's arrays, those not yet freed when the loss begins."""

_FORWARD_IN_FLIGHT, _FORWARD_IN_FLIGHT_RECOMPUTED = 1.0, 1.3
"""GPU: what the forward pass leaves in flight, as a share of what the layers keep: arrays that it kept not, and where
they are computed again, also those that it would have kept. They share the buffers with the loss that follows: """

_BESIDE_LOSS, _BESIDE_LOSS_RECOMPUTED = 0.33, 1.0
"""of those that the loss does not fill, what the forward pass still holds when the loss is at its peak; all of them
where it keeps nothing, in the attention form."""

_LARGEST_IN_UPDATE, _MATRICES_IN_UPDATE = 2, 8
"""Arrays that the optimizer has at once beside old and new weights: of the embedding, or of the MLP's matrices."""


@dataclass(frozen=True)
class _Layer:
    """Bytes of one layer for one micro-batch."""

    activations: float
    """What it keeps from its forward pass for its backward one."""
    states: float
    """States between the chunks, which it keeps too."""
    working: float
    """What making its gradients takes beside."""
    left: float
    """What is left of it for a while when the forward pass has gone on."""
    in_flight: float = 0.0
    """How much of `working` is only in flight on a GPU."""


def parameters(profile: Profile) -> int:
    """Numbers of the model: the tied embedding, the layers, the last norm."""
    shape = _shape(profile)
    return shape.vocab_size * shape.width + shape.layers * _layer_parameters(shape) + shape.width


def moments(profile: Profile, setting: Setting) -> list[Moment]:
    """The loss, the first and the last layer of the backward pass, and the update."""
    shape, train = _shape(profile), profile.train
    sequences, time = micro_batch(profile, setting.ranks), train.sequence_length
    tokens = sequences * time
    weights = 4.0 * parameters(profile)
    embedding, layer_weights = 4.0 * shape.vocab_size * shape.width, 4.0 * _layer_parameters(shape)
    summed = weights if micro_batches(profile, setting.ranks) > 1 else 0.0
    layer = _layer(shape, sequences, time, setting)
    inputs = 1.0 * setting.compute_bytes * tokens * shape.width  # all that a layer keeps where it is computed again

    always = {
        TRAINED: weights,
        COPIES: 0.0 if setting.compute_bytes == 4 else weights * setting.compute_bytes / 4,
        OPTIMIZER: 2 * weights,
        DATA: 4.0 * sequences * (time + 2),
    }
    if train.backward == "layerwise":
        return _layerwise(shape, sequences, time, setting, always, summed)
    loss = _logits(tokens, shape, setting)
    recomputed = train.gradient_checkpointing or _is_chunked(shape, time)
    left = _left_in_flight(shape, layer, tokens, setting, train.gradient_checkpointing) if setting.gpu else layer.left
    # The loss takes what room the layer leaves in flight; what is computed again gives it time to end.
    loss_still = min(loss, max(0.0, in_flight_bytes(setting) - layer.in_flight)) * (0.5 if recomputed else 1.0)
    ahead = _RECOMPUTED_AHEAD if train.gradient_checkpointing and not setting.gpu else 1.0
    if train.gradient_checkpointing:
        kept, states = inputs * shape.layers, 0.0
        once, state_once = layer.activations + ahead * layer.working, layer.states
    else:
        kept, states = layer.activations * shape.layers, layer.states * shape.layers
        once, state_once = layer.working, 0.0
    return [
        _moment(
            "loss",
            always,
            {GRADIENTS: summed + embedding, ACTIVATIONS: kept + left, STATES: states, LOGITS: loss},
        ),
        _moment(
            "backward, last layer",
            always,
            {
                GRADIENTS: summed + embedding + layer_weights,
                ACTIVATIONS: kept + once,
                LOGITS: loss_still,
                STATES: states + state_once,
            },
        ),
        _moment(
            "backward, first layer",
            always,
            {GRADIENTS: summed + weights, ACTIVATIONS: layer.activations + ahead * layer.working, STATES: layer.states},
        ),
        _update(shape, always, setting),
    ]


def shape(profile: Profile) -> tuple[Any, ...]:
    """What the time of a step depends on beside `[train]`."""
    return tuple(_model(profile).model_dump(exclude={"init_from", "rope_theta"}).values())


def operations(profile: Profile) -> float:
    """Products of a step, forward (once more with gradient checkpointing) and backward, which is twice as much."""
    shape, train = _shape(profile), profile.train
    assert shape.kv_heads is not None
    head, length = shape.width // shape.heads, train.sequence_length
    matrices = 2.0 * (_layer_parameters(shape) - 2 * shape.width)
    if _is_chunked(shape, length):
        chunk = min(shape.chunk_size, length)
        state = state_features(head, shape.power) * (head + 1)
        op = 2.0 * shape.heads * chunk * (2 * head + 1) + 2.0 * (shape.heads + shape.kv_heads) * state
        again = 2.0 if train.gradient_checkpointing else 1.0  # each chunk is computed again in any case
    else:
        op = 2.0 * shape.heads * length * (2 * head + 1)
        again = 1.0 if train.gradient_checkpointing else 0.0
    layers = shape.layers * (matrices * (4 if train.gradient_checkpointing else 3) + op * (3 + again))
    return train.batch_size * length * (layers + 3 * 2.0 * shape.vocab_size * shape.width)


def less_memory(profile: Profile) -> Mapping[str, str]:
    """See `engine.planning.Demand`."""
    if profile.train.backward == "layerwise":
        return {}
    return {**({} if profile.train.gradient_checkpointing else CHECKPOINTING), **LAYERWISE}


def savings(profile: Profile, setting: Setting) -> list[Saving]:
    """See `engine.planning.Demand`."""
    return []


def download_bytes(profile: Profile) -> int:
    """Nothing is."""
    return 0


def _layerwise(
    shape: RetentionLMConfig, sequences: int, time: int, setting: Setting, always: dict[str, float], summed: float
) -> list[Moment]:
    """As engine.layerwise goes: a layer's input is kept, a piece of a half-layer at a time is worked on."""
    tokens, alive = sequences * time, ON_GPU if setting.gpu else ON_CPU
    weights, layer_weights = always[TRAINED], 4.0 * _layer_parameters(shape)
    hidden = 1.0 * setting.compute_bytes * tokens * shape.width
    if setting.compute_bytes != 4:
        always = always | {COPIES: layer_weights * setting.compute_bytes / 4}
    chunk = tokens_at_once(shape.vocab_size, setting.gpu)
    ahead = alive.logits_ahead * min(max(tokens / chunk - 1, 0.0), 1.0)
    logits = (alive.logits + ahead) * setting.compute_bytes * min(chunk, tokens) * shape.vocab_size
    mlp, piece = alive.mlp + alive.mlp_full, min(tokens, BACKWARD_TOKENS)
    by_token = setting.compute_bytes * (mlp.inner * _hidden(shape) + mlp.wide * shape.width)
    layer = _layer(shape, min(sequences, max(1, BACKWARD_TOKENS // time)), time, setting)
    halves = {
        "mlp": (piece * by_token, 0.0),
        "retention": (layer.activations + layer.working, layer.states),
    }
    # The output layer is the embedding, and learns: a chunk's gradient is added to those of the chunks before.
    added = 2 * 4.0 * shape.vocab_size * shape.width if summed or tokens > chunk else 0.0
    loss = {GRADIENTS: summed + added, ACTIVATIONS: shape.layers * hidden + alive.loss_beside * hidden, LOGITS: logits}
    moments = [_moment("loss", always, loss)]
    for name, (working, states) in halves.items():  # in the last layer, and in the first, when all gradients are there
        beside = working + alive.mlp.beside * hidden
        for gradients, layers in ((max(summed, layer_weights), shape.layers), (weights, 1)):
            now = {GRADIENTS: gradients, ACTIVATIONS: layers * hidden + beside, STATES: states}
            moments.append(_moment(f"backward, {name}", always, now))
    return [*moments, _update(shape, always, setting)]


def _update(shape: RetentionLMConfig, always: dict[str, float], setting: Setting) -> Moment:
    weights = always[TRAINED]
    embedding, matrix = 4.0 * shape.vocab_size * shape.width, 4.0 * shape.width * _hidden(shape)
    largest = max(_LARGEST_IN_UPDATE * embedding, _MATRICES_IN_UPDATE * matrix)
    made_anew = min(max(weights + largest, in_flight_bytes(setting)), 3 * weights)
    return _moment("update", {**always, COPIES: 0.0}, {GRADIENTS: weights, UPDATE: made_anew})


def _layer(shape: RetentionLMConfig, sequences: int, time: int, setting: Setting) -> _Layer:
    """Counts in numbers a token: those of the computation's dtype, and those of the op, which computes in float32."""
    assert shape.kv_heads is not None
    tokens, width, heads = sequences * time, shape.width, shape.heads
    head = width // heads
    keys, inner = shape.kv_heads * head, (_INNER_KEPT_FUSED if setting.gpu else _INNER_KEPT) * _hidden(shape)
    mlp = setting.compute_bytes * _MLP_GRADIENTS * _hidden(shape) * tokens
    left = setting.compute_bytes * _FORWARD_LEFT * (inner + 8 * width) * tokens
    if _is_chunked(shape, time):
        chunk = min(shape.chunk_size, time)
        chunks, features = math.ceil(time / chunk), state_features(head, shape.power)
        states = 4.0 * sequences * shape.kv_heads * features * (head + 1) * (chunks - 1)
        # Two norms' inputs and outputs, queries, the op's output in pieces, joined and by token; keys and values twice.
        kept = 1.0 * setting.compute_bytes * (inner + 8 * width + 4 * keys) * tokens
        near = 2 * chunk + 3 * _BLOCK  # scores of a token: in its chunk and in its block
        if setting.gpu:
            kept += 1.0 * setting.compute_bytes * width * tokens  # the op's output once more
            array = 4.0 * sequences * chunk * heads * (features + near)
            flying = min(_CHUNK_IN_FLIGHT * array, in_flight_bytes(setting))
            return _Layer(kept, states, _CHUNK_GRADIENTS * array + flying, left, flying)
        expanded = _FEATURE_GRADIENTS * features + _CHUNK_SCORE_GRADIENTS * near
        op = 4.0 * (sequences * chunk * heads * expanded + _CHUNKED_WIDE_GRADIENTS * width * tokens)
        return _Layer(kept, states, max(mlp, op), left)
    padded = math.ceil(time / _BLOCK) * _BLOCK
    scores = padded * padded / time  # rows of zeros fill up the last block
    # Outside: two norms' inputs and outputs, the op's output by token. Inside: queries scaled and gated, the sums, keys
    # and values; of the scores those before and after power and decay, in blocks also the decays.
    outside = inner + 5 * width
    inside = 3 * width + 6.5 * keys + heads * (2 * scores + 3 * _BLOCK + padded / _BLOCK)
    op = 4.0 * tokens * (
        heads * (_SCORE_GRADIENTS * scores + _BLOCK_GRADIENTS * _BLOCK) + _WIDE_GRADIENTS * width
    )  # fmt: skip
    kept = (setting.compute_bytes * outside + 4.0 * inside) * tokens
    if setting.gpu:
        flying = min((1 - _FUSED_GRADIENTS) * kept, in_flight_bytes(setting))
        return _Layer(kept, 0.0, _FUSED_GRADIENTS * kept + flying, left, flying)
    return _Layer(kept, 0.0, max(mlp, op), left)


def _logits(tokens: int, shape: RetentionLMConfig, setting: Setting) -> float:
    """Bytes of the loss at its peak: what a chunk needs, and what MLX has queued of the next ones."""
    vocabulary = shape.vocab_size
    chunk = max(1, LOGITS_AT_ONCE // vocabulary)
    chunks = tokens / chunk
    if setting.gpu:
        logits = min(chunk, tokens) * vocabulary
        to_weight = 4.0 * (math.ceil(chunks) - 0.5) * vocabulary * shape.width  # a chunk's in bfloat16, and its sum
        everything = 4.0 * _LOGITS_MADE * tokens * vocabulary + to_weight
        return min(everything, 4.0 * _LOGITS_MADE / _LOGITS_READ * arrays_read(logits, setting) * logits)
    at_once = min(chunks, 1.0)
    at_once += min(max(chunks - 1, 0.0), _FULL_CHUNKS_AHEAD)
    at_once += 0.5 * min(max(chunks - 1 - _FULL_CHUNKS_AHEAD, 0.0), _HALF_CHUNKS_AHEAD)
    return 4.0 * _LOGITS_ALIVE * at_once * chunk * vocabulary


def _left_in_flight(
    shape: RetentionLMConfig, layer: _Layer, tokens: int, setting: Setting, checkpointing: bool
) -> float:
    """Bytes of the forward pass that are still in flight when the loss is at its peak."""
    buffers = _LOGITS_READ * tokens * shape.vocab_size / buffer_numbers(setting)
    share = _FORWARD_IN_FLIGHT_RECOMPUTED if checkpointing else _FORWARD_IN_FLIGHT
    beside = _BESIDE_LOSS_RECOMPUTED if checkpointing and not layer.states else _BESIDE_LOSS
    room = beside * in_flight_bytes(setting) * max(0.0, 1 - buffers / BUFFERS)
    return min(share * shape.layers * layer.activations, room)


def _moment(name: str, always: dict[str, float], now: dict[str, float]) -> Moment:
    together = always | now
    return Moment(name, {part: round(together[part]) for part in IN_MLX if together.get(part)})


def _shape(profile: Profile) -> RetentionLMConfig:
    model = _model(profile)
    return RetentionLMConfig(**{name: getattr(model, name) for name in RetentionLMConfig.__dataclass_fields__})


def _model(profile: Profile) -> RetentionModel:
    assert isinstance(profile, RetentionProfile)
    return profile.model


def _hidden(shape: RetentionLMConfig) -> int:
    assert shape.hidden is not None
    return shape.hidden


def _layer_parameters(shape: RetentionLMConfig) -> int:
    """Query and output, key and value, gate, the MLP's three, two norms."""
    assert shape.kv_heads is not None
    width, keys = shape.width, shape.kv_heads * (shape.width // shape.heads)
    return 2 * width * width + 2 * width * keys + width * shape.kv_heads + 3 * width * _hidden(shape) + 2 * width


def _is_chunked(shape: RetentionLMConfig, time: int) -> bool:
    has_state = shape.power < 4 or shape.width // shape.heads <= LARGEST_HEAD_DIM_OF_POWER_4
    return time > shape.switch_over and has_state
