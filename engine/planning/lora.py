"""The memory and the operations of a fine-tuning step: a pretrained base, an adapter, one of two ways backward.

What lasts follows from the geometry. What comes and goes follows from reading engine.layerwise, engine.backward and
mlx-lm's layers: which arrays a piece of a half-layer keeps. How many more are alive while its gradients are made,
because MLX queues operations ahead, is measured: tests/benchmarks/plan_accuracy.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.layerwise import PIECE_TOKENS
from engine.ops.losses import tokens_at_once
from engine.planning import (
    ACTIVATIONS,
    CHECKPOINTING,
    COPIES,
    DATA,
    FROZEN,
    GRADIENTS,
    IN_MLX,
    LAYERWISE,
    LOGITS,
    OPTIMIZER,
    TRAINED,
    UPDATE,
    Moment,
    Saving,
    Setting,
    micro_batch,
    micro_batches,
)
from engine.planning.geometry import Geometry, geometry
from engine.profile import LoRAProfile, Profile

_MOMENTS_OF_OPTIMIZER = {"adamw": 2, "adam": 2, "lion": 1, "sgd": 1, "muon": 1}
"""Numbers that an optimizer keeps for each that learns."""

_MLP_INNER, _MLP_WIDE = 15.9, 5.4
"""Arrays of the MLP's inner size, and of the width, that are alive while its gradients are made."""

_ATTENTION_WIDE, _ATTENTION_KEYS, _SCORES = 11.0, 5.5, 4.0
"""The same of attention: arrays of the width, of the keys' width, and of the scores of all heads."""

_MLP_INNER_DROPPED, _MLP_WIDE_DROPPED, _ATTENTION_WIDE_DROPPED = 1.0, 2.0, 1.0
"""What dropout adds to them."""

_BESIDE_A_HALF, _LOSS_WIDE = 3.0, 6.0
"""Hidden states of all tokens beside a half-layer (its input, the slopes before and after it), and beside the loss."""

_LOGITS_ALIVE = 6.0
"""Arrays as large as a chunk's logits."""


def parameters(profile: Profile) -> int:
    """Numbers of the base and of its adapter."""
    shape, adapter = _geometry(profile), _lora(profile).adapter
    return shape.parameters + (0 if adapter.method == "full" else shape.trained_numbers)


def shape(profile: Profile) -> tuple[Any, ...]:
    """What the time of a step depends on beside `[train]`: also the rows, whose lengths differ."""
    lora = _lora(profile)
    adapter = lora.adapter.model_dump(exclude={"alpha", "init_from"})
    return tuple(str(value) for value in (*lora.model.model_dump().values(), *adapter.values(), lora.data))


def operations(profile: Profile) -> float:
    """Products of a step of full length: forward, once more where layers are computed again, and backward.

    Through what is frozen only the slopes by its input go back: as much again, not twice as much.
    """
    shape, train, full = _geometry(profile), profile.train, _lora(profile).adapter.method == "full"
    again = 1 if train.backward == "layerwise" or train.gradient_checkpointing else 0
    matrices = 2.0 * shape.matrices * (2 + again + full)
    adapter = 0.0 if full else 2.0 * shape.trained_numbers * (3 + again)
    scores = 2.0 * 2 * shape.layers * shape.heads * shape.head_dim * train.sequence_length * (3 + again)
    head = 2.0 * shape.vocabulary * shape.width * (2 + full)
    return train.batch_size * train.sequence_length * (matrices + adapter + scores + head)


def less_memory(profile: Profile) -> Mapping[str, str]:
    """See `engine.planning.Demand`."""
    found: dict[str, str] = {}
    if profile.train.backward != "layerwise":
        found |= {} if profile.train.gradient_checkpointing else CHECKPOINTING
        found |= LAYERWISE
    lora = _lora(profile)
    if lora.adapter.method != "full" and not _geometry(profile).weights.packed_bytes:
        found["model.quantize_bits=4"] = "the base in 4 bits (QLoRA): it knows a little less"
    return found


def download_bytes(profile: Profile) -> int:
    """The base's files, where they are not here: bfloat16, or packed."""
    shape = _geometry(profile)
    if shape.base.is_here:
        return 0
    return (shape.weights if shape.comes_packed else shape.unquantized).bytes(2)


def optimizer_bytes(name: str, shapes: tuple[tuple[int, ...], ...]) -> int:
    """What an optimizer keeps in float32; Adafactor only a matrix's row and column means (arXiv 1804.04235)."""
    if name != "adafactor":
        return 4 * _MOMENTS_OF_OPTIMIZER[name] * sum(math.prod(shape) for shape in shapes)
    return 4 * sum(
        math.prod(shape[:-1]) + math.prod((*shape[:-2], shape[-1])) if len(shape) >= 2 else math.prod(shape)
        for shape in shapes
    )  # fmt: skip


def moments(profile: Profile, setting: Setting) -> list[Moment]:
    """The loss, the backward pass of the last and of the first layer that learns, and the update."""
    sizes = _Sizes.of(profile, setting)
    return (_layerwise if profile.train.backward == "layerwise" else _whole)(sizes)


def savings(profile: Profile, setting: Setting) -> list[Saving]:
    """See `engine.planning.Demand`."""
    shape, train, size = _geometry(profile), profile.train, setting.compute_bytes

    def peak(**changed: Any) -> int:
        other = profile.model_copy(update={"train": train.model_copy(update=changed)})
        return max(moment.total_bytes for moment in moments(other, setting))

    now, found = peak(), list[Saving]()
    layerwise = train.backward == "layerwise"
    other_way = abs(peak(backward="whole" if layerwise else "layerwise") - now)
    found.append(Saving("layer by layer", other_way, layerwise, "instead of one graph"))
    if not layerwise:
        on = train.gradient_checkpointing
        saved = abs(peak(gradient_checkpointing=not on) - now)
        found.append(Saving("gradient checkpointing", saved, on, "instead of keeping what every layer makes"))
    tokens = micro_batch(profile, setting.ranks) * train.sequence_length
    chunk = min(tokens, tokens_at_once(shape.vocabulary))
    in_chunks = round(_LOGITS_ALIVE * size * (tokens - chunk) * shape.vocabulary)
    found.append(Saving("loss in chunks", in_chunks, True, f"of {chunk:,} tokens, instead of all logits at once"))
    if _lora(profile).adapter.method != "full":
        packed = shape.unquantized.bytes(size) - shape.weights.bytes(size)
        if packed > 0:
            found.append(Saving("quantized base", packed, True, f"instead of {8 * size} bits"))
        else:
            saved = round(shape.unquantized.bytes(size) * (1 - 4.5 / (8 * size)))
            found.append(Saving("4 bits", saved, False, f"instead of {8 * size}, with model.quantize_bits = 4"))
        words = "training, chat and the comparison with the base share it"
        found.append(Saving("one base in memory", shape.weights.bytes(size), True, words))
    if shape.tied:
        head = size * shape.vocabulary * shape.width
        found.append(Saving("one embedding", head, True, "the output layer shares it"))
    return found


@dataclass(frozen=True)
class _Sizes:
    """What the arithmetic of both ways begins with; bytes, but for tokens."""

    shape: Geometry
    setting: Setting
    sequences: int
    length: int
    accumulates: bool
    full: bool
    checkpointing: bool
    dropout: bool
    layers: int
    """From the lowest that learns on: those that the backward pass goes through."""
    trained: float
    """In float32, as their gradients are."""
    optimizer: float
    data: float

    @classmethod
    def of(cls, profile: Profile, setting: Setting) -> _Sizes:
        shape, lora, train = _geometry(profile), _lora(profile), profile.train
        sequences, full = micro_batch(profile, setting.ranks), lora.adapter.method == "full"
        return cls(
            shape=shape,
            setting=setting,
            sequences=sequences,
            length=train.sequence_length,
            accumulates=micro_batches(profile, setting.ranks) > 1,
            full=full,
            checkpointing=train.gradient_checkpointing,
            dropout=lora.adapter.dropout > 0 and not full,
            layers=shape.layers if full else min(lora.adapter.layers or shape.layers, shape.layers),
            trained=4.0 * shape.trained_numbers,
            optimizer=1.0 * optimizer_bytes(train.optimizer, shape.trained),
            data=5.0 * sequences * (train.sequence_length + 1),
        )

    @property
    def tokens(self) -> int:
        return self.sequences * self.length

    def numbers(self, *counts: float) -> float:
        """Bytes of so many numbers in the dtype of the computation."""
        return self.setting.compute_bytes * math.prod(counts)

    @property
    def always(self) -> dict[str, float]:
        return {
            FROZEN: self.shape.frozen.bytes(self.setting.compute_bytes),
            TRAINED: self.trained,
            OPTIMIZER: self.optimizer,
            DATA: self.data,
        }

    @property
    def hidden(self) -> float:
        """The hidden states of all tokens between two layers."""
        return self.numbers(self.tokens, self.shape.width)

    def mlp(self, tokens: int) -> float:
        """What making an MLP's gradients takes for so many tokens."""
        inner = _MLP_INNER + (_MLP_INNER_DROPPED if self.dropout else 0)
        wide = _MLP_WIDE + (_MLP_WIDE_DROPPED if self.dropout else 0)
        return self.numbers(tokens, inner * self.shape.inner + wide * self.shape.width)

    def attention(self, sequences: int) -> float:
        """What making attention's gradients takes for so many sequences."""
        shape, tokens = self.shape, sequences * self.length
        queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        wide = _ATTENTION_WIDE + (_ATTENTION_WIDE_DROPPED if self.dropout else 0)
        by_token = wide * (shape.width + queries) / 2 + _ATTENTION_KEYS * keys
        return self.numbers(tokens, by_token + _SCORES * shape.heads * self.length)

    def logits(self) -> float:
        rows = min(self.tokens, tokens_at_once(self.shape.vocabulary))
        return _LOGITS_ALIVE * self.numbers(rows, self.shape.vocabulary)


def _layerwise(sizes: _Sizes) -> list[Moment]:
    """As engine.layerwise goes: a layer's input is kept, a piece of a half-layer at a time is worked on."""
    always, hidden = sizes.always, sizes.hidden
    piece = min(sizes.tokens, PIECE_TOKENS)
    sequences = min(sizes.sequences, max(1, PIECE_TOKENS // sizes.length))
    all_kept = sizes.layers * hidden
    share = 4.0 * sizes.shape.layer_trained
    if sizes.setting.compute_bytes != 4:
        always = always | {COPIES: sizes.setting.compute_bytes * sizes.shape.layer_trained}
    before = sizes.trained if sizes.accumulates else 0.0
    last = max(before, share)
    half = {"attention": sizes.attention(sequences), "mlp": sizes.mlp(piece)}
    moments = [
        _moment(
            "loss", always, {GRADIENTS: before, ACTIVATIONS: all_kept + _LOSS_WIDE * hidden, LOGITS: sizes.logits()}
        )
    ]
    for name, working in half.items():
        beside = _BESIDE_A_HALF * hidden + working
        moments.append(_moment(f"backward, {name}", always, {GRADIENTS: last, ACTIVATIONS: all_kept + beside}))
        moments.append(_moment(f"backward, {name}", always, {GRADIENTS: sizes.trained, ACTIVATIONS: hidden + beside}))
    return [*moments, _update(sizes)]


def _whole(sizes: _Sizes) -> list[Moment]:
    """One graph; with gradient checkpointing a layer at a time is computed again."""
    always, hidden = sizes.always, sizes.hidden
    if sizes.setting.compute_bytes != 4:
        always = always | {COPIES: sizes.trained * sizes.setting.compute_bytes / 4}
    before = sizes.trained if sizes.accumulates else 0.0
    layer = sizes.mlp(sizes.tokens) + sizes.attention(sizes.sequences)
    kept = sizes.layers * (hidden if sizes.checkpointing else layer)
    return [
        _moment("loss", always, {GRADIENTS: before, ACTIVATIONS: kept + _LOSS_WIDE * hidden, LOGITS: sizes.logits()}),
        _moment("backward, a layer", always, {GRADIENTS: before, ACTIVATIONS: kept + _BESIDE_A_HALF * hidden + layer}),
        _update(sizes),
    ]


def _update(sizes: _Sizes) -> Moment:
    """Old and new weights and moments of the optimizer, beside the gradients."""
    made_anew = sizes.trained + sizes.optimizer
    return _moment("update", sizes.always, {GRADIENTS: sizes.trained, UPDATE: made_anew})


def _moment(name: str, always: Mapping[str, float], now: Mapping[str, float]) -> Moment:
    together = {**always, **now}
    return Moment(name, {part: round(together[part]) for part in IN_MLX if together.get(part)})


def _lora(profile: Profile) -> LoRAProfile:
    assert isinstance(profile, LoRAProfile)
    return profile


def _geometry(profile: Profile) -> Geometry:
    return geometry(_lora(profile))
