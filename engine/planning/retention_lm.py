"""The memory and the operations of a step of a power-retention language model.

Which arrays a step keeps follows from reading `engine.update`, `engine.models`, `engine.ops`. How many more are alive
while a layer's gradients are made depends on how far MLX runs ahead of the device, because an array's memory is taken
when its operation is queued. Those few factors are measured (MLX 0.32 on CPU, float32; 170 shapes, from one layer to
twelve, 64 to 1,024 tokens, vocabularies of 300 to 100,000): tests/benchmarks/plan_accuracy.py shows how well they hold.

Assumed on GPUs, and not measured: the same arrays, those outside of the op and of the loss in bfloat16 beside float32
weights; and that a chunk of the loss begins when the one before it is done.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from engine.models.retention_lm import RetentionLMConfig
from engine.ops.losses import LOGITS_AT_ONCE
from engine.ops.power_retention import LARGEST_HEAD_DIM_OF_POWER_4, state_features
from engine.planning import (
    ACTIVATIONS,
    COPIES,
    DATA,
    GRADIENTS,
    IN_MLX,
    LOGITS,
    OPTIMIZER,
    STATES,
    TRAINED,
    UPDATE,
    Moment,
    Setting,
    micro_batch,
    micro_batches,
)
from engine.profile import Profile

_BLOCK = 32
"""Tokens of a block of the attention form, as in `engine.ops.power_retention`."""

_LOGITS_ALIVE = 4
"""Arrays as large as a chunk's logits: logits, exponentials, slopes, and slopes less the one-hot targets."""

_FULL_CHUNKS_AHEAD, _HALF_CHUNKS_AHEAD = 1, 1
"""On CPU MLX queues about fifty operations, two and a half chunks of the loss: the second one has all its arrays
already, the third a half of them."""

_MLP_GRADIENTS = 6.0
"""Arrays of the MLP's inner size while its gradients are made: those of its five, and one ahead."""

_SCORE_GRADIENTS, _BLOCK_GRADIENTS, _WIDE_GRADIENTS = 2.65, 6.5, 10.6
"""Attention form: arrays of scores, of scores inside blocks, and of the width while the op's gradients are made."""

_FEATURE_GRADIENTS, _CHUNK_SCORE_GRADIENTS, _CHUNKED_WIDE_GRADIENTS = 4.6, 0.9, 9.7
"""Chunked form, the same: arrays of the expanded queries and of the scores of one chunk, and of the width."""

_RECOMPUTED_AHEAD = 1.15
"""With gradient checkpointing the recomputation of the next layer begins a little before a layer is done."""

_FORWARD_LEFT = 0.8
"""Of the last layer's arrays, those not yet freed when the loss begins."""

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
    if train.gradient_checkpointing:
        kept, states = inputs * shape.layers, 0.0
        once, state_once = layer.activations + _RECOMPUTED_AHEAD * layer.working, layer.states
    else:
        kept, states = layer.activations * shape.layers, layer.states * shape.layers
        once, state_once = layer.working, 0.0
    last = layer.working if not train.gradient_checkpointing else _RECOMPUTED_AHEAD * layer.working
    largest = max(_LARGEST_IN_UPDATE * embedding, _MATRICES_IN_UPDATE * 4.0 * shape.width * _hidden(shape))
    return [
        _moment(
            "loss",
            always,
            {
                GRADIENTS: summed + embedding,
                ACTIVATIONS: kept + layer.left,
                STATES: states,
                LOGITS: _logits(tokens, shape.vocab_size, setting),
            },
        ),
        _moment(
            "backward, last layer",
            always,
            {
                GRADIENTS: summed + embedding + layer_weights,
                ACTIVATIONS: kept + once,
                STATES: states + state_once,
            },
        ),
        _moment(
            "backward, first layer",
            always,
            {GRADIENTS: summed + weights, ACTIVATIONS: layer.activations + last, STATES: layer.states},
        ),
        _moment("update", {**always, COPIES: 0.0}, {GRADIENTS: weights, UPDATE: min(weights + largest, 3 * weights)}),
    ]


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


def _layer(shape: RetentionLMConfig, sequences: int, time: int, setting: Setting) -> _Layer:
    """Counts in numbers a token: those of the computation's dtype, and those of the op, which computes in float32."""
    assert shape.kv_heads is not None
    tokens, width, heads = sequences * time, shape.width, shape.heads
    head = width // heads
    keys, inner = shape.kv_heads * head, 5.0 * _hidden(shape)  # gate, up, sigmoid, silu and their product
    mlp = setting.compute_bytes * _MLP_GRADIENTS * _hidden(shape) * tokens
    left = setting.compute_bytes * _FORWARD_LEFT * (inner + 8 * width) * tokens
    if _is_chunked(shape, time):
        chunk = min(shape.chunk_size, time)
        chunks, features = math.ceil(time / chunk), state_features(head, shape.power)
        states = 4.0 * sequences * shape.kv_heads * features * (head + 1) * (chunks - 1)
        # Two norms' inputs and outputs, queries, the op's output in pieces, joined and by token; keys and values twice.
        kept = setting.compute_bytes * (inner + 8 * width + 4 * keys) * tokens
        expanded = _FEATURE_GRADIENTS * features + _CHUNK_SCORE_GRADIENTS * (2 * chunk + 3 * _BLOCK)
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
    return _Layer((setting.compute_bytes * outside + 4.0 * inside) * tokens, 0.0, max(mlp, op), left)


def _logits(tokens: int, vocabulary: int, setting: Setting) -> float:
    """Bytes of the loss at its peak: what a chunk needs, and what MLX has queued of the next ones."""
    chunk = max(1, LOGITS_AT_ONCE // vocabulary)
    chunks = tokens / chunk
    at_once = min(chunks, 1.0)
    if not setting.gpu:
        at_once += min(max(chunks - 1, 0.0), _FULL_CHUNKS_AHEAD)
        at_once += 0.5 * min(max(chunks - 1 - _FULL_CHUNKS_AHEAD, 0.0), _HALF_CHUNKS_AHEAD)
    return 4.0 * _LOGITS_ALIVE * at_once * chunk * vocabulary


def _moment(name: str, always: dict[str, float], now: dict[str, float]) -> Moment:
    together = always | now
    return Moment(name, {part: round(together[part]) for part in IN_MLX if together.get(part)})


def _shape(profile: Profile) -> RetentionLMConfig:
    model = profile.model
    return RetentionLMConfig(**{name: getattr(model, name) for name in RetentionLMConfig.__dataclass_fields__})


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
