"""The memory and the operations of a fine-tuning step: a pretrained base, an adapter, one of two ways backward.

What lasts follows from the geometry. What comes and goes follows from reading engine.layerwise and engine.backward: a
layer's input is kept, and of one piece, or of one layer, all that its gradients are made of is alive at once. How many
arrays that are is measured (engine.planning.alive); tests/benchmarks/plan_accuracy_lora.py shows how well it holds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.layerwise import BACKWARD_TOKENS, FORWARD_TOKENS
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
from engine.planning.alive import NOTHING, ON_CPU, ON_GPU, ON_METAL, Alive, Counts
from engine.planning.geometry import Geometry, geometry
from engine.planning.in_flight import in_flight_bytes
from engine.profile import LoRAProfile, Profile

_MOMENTS_OF_OPTIMIZER = {"adamw": 2, "adam": 2, "lion": 1, "sgd": 1, "muon": 1}
"""Numbers that an optimizer keeps for each that learns."""

_LARGEST_IN_UPDATE, _MATRICES_IN_UPDATE = 2, 8
"""Arrays that the optimizer has at once beside old and new weights: of the largest, or of a layer's largest."""


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
    other_way = (peak(backward="whole") - now) if layerwise else (now - peak(backward="layerwise"))
    found.append(Saving("layer by layer", other_way, layerwise, "instead of one graph"))
    if not layerwise:
        on = train.gradient_checkpointing
        saved = (peak(gradient_checkpointing=not on) - now) * (1 if on else -1)
        found.append(Saving("gradient checkpointing", saved, on, "instead of keeping what every layer makes"))
    tokens = micro_batch(profile, setting.ranks) * train.sequence_length
    chunk = min(tokens, tokens_at_once(shape.vocabulary, setting.gpu))
    alive = ON_GPU if setting.gpu else ON_CPU
    in_chunks = round(alive.logits * size * (tokens - chunk) * shape.vocabulary)
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
    return [saving for saving in found if saving.bytes > 0]


@dataclass(frozen=True)
class _Sizes:
    """What the arithmetic of both ways begins with; bytes, but for tokens."""

    shape: Geometry
    setting: Setting
    sequences: int
    length: int
    accumulates: bool
    method: str
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
            method=lora.adapter.method,
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

    @property
    def alive(self) -> Counts:
        if self.setting.metal:
            return ON_METAL
        return ON_GPU if self.setting.gpu else ON_CPU

    def arrays(self, counts: Alive, sequences: float) -> float:
        """What so many arrays take for so many sequences."""
        shape, tokens = self.shape, sequences * self.length
        wide = (shape.width + shape.heads * shape.head_dim) / 2
        keys = shape.kv_heads * shape.head_dim
        by_token = counts.inner * shape.inner + counts.wide * wide + counts.keys * keys
        return self.numbers(tokens, by_token + counts.scores * shape.heads * self.length)

    def working(self, counts: Alive, sequences: float) -> float:
        """What so many sequences take while they are worked on, of all that are in memory at once."""
        alive = self.arrays(counts, sequences)
        in_flight = min(self.alive.in_flight * alive, in_flight_bytes(self.setting))
        return alive + in_flight + counts.beside * self.hidden

    @property
    def logits(self) -> float:
        """What the loss takes for a chunk of tokens, and for what has been begun of the next."""
        rows = tokens_at_once(self.shape.vocabulary, self.setting.gpu)
        ahead = self.alive.logits_ahead * min(max(self.tokens / rows - 1, 0.0), 1.0)
        return (self.alive.logits + ahead) * self.numbers(min(rows, self.tokens), self.shape.vocabulary)


def _layerwise(sizes: _Sizes) -> list[Moment]:
    """As engine.layerwise goes: a layer's input is kept, a piece of a half-layer at a time is worked on."""
    always, hidden, alive = sizes.always, sizes.hidden, sizes.alive
    if sizes.setting.compute_bytes != 4:
        always = always | {COPIES: sizes.setting.compute_bytes * sizes.shape.layer_trained}
    mlp, attention = alive.mlp, alive.attention
    match sizes.method:
        case "dora":
            mlp, attention = mlp + alive.mlp_dora, attention + alive.attention_dora
        case "full":
            mlp += alive.mlp_full
    if sizes.dropout:
        mlp, attention = mlp + alive.mlp_dropout, attention + alive.attention_dropout
    halves = {
        "mlp": sizes.working(mlp, min(sizes.tokens, BACKWARD_TOKENS) / sizes.length),
        "attention": sizes.working(attention, min(sizes.sequences, max(1, BACKWARD_TOKENS // sizes.length))),
    }
    tokens = BACKWARD_TOKENS if sizes.dropout else FORWARD_TOKENS
    again = {
        "mlp": sizes.working(alive.mlp_forward, min(sizes.tokens, tokens) / sizes.length),
        "attention": sizes.working(alive.attention_forward, min(sizes.sequences, max(1, tokens // sizes.length))),
    }
    kept, before = sizes.layers * hidden, sizes.trained if sizes.accumulates else 0.0
    share = max(before, 4.0 * sizes.shape.layer_trained)
    # Where there are several chunks, the first has waited for it.
    left = alive.loss_left if sizes.tokens <= tokens_at_once(sizes.shape.vocabulary, sizes.setting.gpu) else 0.0
    last = sizes.arrays(Alive(inner=left), min(sizes.tokens, tokens) / sizes.length)
    moments = [_loss(sizes, always, kept + last, before)]
    for name, working in again.items():
        moments.append(_moment(f"forward, {name}", always, {GRADIENTS: share, ACTIVATIONS: kept + working}))
    for name, working in halves.items():  # in the last layer, and in the first, when all gradients are there
        moments.append(_moment(f"backward, {name}", always, {GRADIENTS: share, ACTIVATIONS: kept + working}))
        moments.append(_moment(f"backward, {name}", always, {GRADIENTS: sizes.trained, ACTIVATIONS: hidden + working}))
    return [*moments, _update(sizes)]


def _whole(sizes: _Sizes) -> list[Moment]:
    """One graph; with gradient checkpointing a layer at a time is computed again. Two micro-batches are added last."""
    always, hidden, alive = sizes.always, sizes.hidden, sizes.alive
    if sizes.setting.compute_bytes != 4:
        always = always | {COPIES: sizes.trained * sizes.setting.compute_bytes / 4}
    added = (alive.layer_dropout if sizes.dropout else NOTHING) + (
        alive.mlp_dora if sizes.method == "dora" else NOTHING
    )
    before = sizes.trained if sizes.accumulates else 0.0
    share = 4.0 * sizes.shape.layer_trained
    if sizes.checkpointing:
        kept, layer, last = sizes.layers * hidden, sizes.working(alive.layer + added, sizes.sequences), hidden
    else:
        last = sizes.arrays(alive.kept, sizes.sequences)
        kept, layer = sizes.layers * last, sizes.working(alive.beside_kept + added, sizes.sequences)
    name = "backward, a layer"
    return [
        _loss(sizes, always, kept, before),
        _moment(name, always, {GRADIENTS: before + share, ACTIVATIONS: kept + layer}),
        _moment(name, always, {GRADIENTS: before + sizes.trained, ACTIVATIONS: last + layer}),
        _update(sizes),
    ]


def _loss(sizes: _Sizes, always: Mapping[str, float], kept: float, before: float) -> Moment:
    activations = kept + sizes.alive.loss_beside * sizes.hidden
    return _moment("loss", always, {GRADIENTS: before, ACTIVATIONS: activations, LOGITS: sizes.logits})


def _update(sizes: _Sizes) -> Moment:
    """Gradients, new weights, and what the optimizer makes of its largest arrays."""
    shapes = [math.prod(shape) for shape in sizes.shape.trained]
    in_layers = [math.prod(shape) for shape in sizes.shape.trained if sizes.shape.vocabulary not in shape]
    largest = 4.0 * max(_LARGEST_IN_UPDATE * max(shapes), _MATRICES_IN_UPDATE * max(in_layers, default=0))
    made_anew = min(max(sizes.trained + largest, in_flight_bytes(sizes.setting)), sizes.trained + sizes.optimizer)
    return _moment("update", sizes.always, {GRADIENTS: sizes.trained, UPDATE: made_anew})


def _moment(name: str, always: Mapping[str, float], now: Mapping[str, float]) -> Moment:
    together = {**always, **now}
    return Moment(name, {part: round(together[part]) for part in IN_MLX if together.get(part)})


def _lora(profile: Profile) -> LoRAProfile:
    assert isinstance(profile, LoRAProfile)
    return profile


def _geometry(profile: Profile) -> Geometry:
    return geometry(_lora(profile))
