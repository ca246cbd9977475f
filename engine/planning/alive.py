"""How many arrays of each size are alive at once while a layer of a language model makes its gradients; measured.

They count beside the hidden states that are kept between layers. On a CPU, in float32 with MLX 0.32: 70 shapes of the
kinds of Qwen2 and Llama, widths of 128 to 768, 128 to 2,048 tokens, 1 to 16 sequences, ranks of 8 to 64; a step's peak
is within 3 % where a layer makes it, and within 7 % where the loss does.

On GPUs elementwise operations are fused, and what is in flight comes on top. Those of CUDA follow from six peaks on an
H200 (Qwen2.5-1.5B's shape in bfloat16, 1 and 4 × 2,048 tokens, pieces of 1,024 to 4,096), which they meet within 5 %;
what dropout adds to a whole graph is a guess. CUDA has one kernel for attention's gradient; Metal, where nothing could
be measured, makes the scores.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Alive:
    """Arrays of an MLP's inner size, of the width, of the keys' width, and of all heads' scores, for each token of a
    piece; and of the hidden states of all tokens of the micro-batch (`beside`)."""

    inner: float = 0.0
    wide: float = 0.0
    keys: float = 0.0
    scores: float = 0.0
    beside: float = 0.0

    def __add__(self, other: Alive) -> Alive:
        return Alive(
            self.inner + other.inner,
            self.wide + other.wide,
            self.keys + other.keys,
            self.scores + other.scores,
            self.beside + other.beside,
        )


NOTHING = Alive()


@dataclass(frozen=True)
class Counts:
    """Of one kind of device."""

    mlp: Alive
    attention: Alive
    """Layer by layer: of a half-layer's piece."""
    mlp_forward: Alive
    attention_forward: Alive
    """The same on the way forward, whose pieces are larger."""
    layer: Alive
    """In one graph: of a layer that is computed again."""
    kept: Alive
    """In one graph, without gradient checkpointing: of each layer, until its gradients are made."""
    beside_kept: Alive
    """The same, while a layer's gradients are made."""
    mlp_dropout: Alive
    attention_dropout: Alive
    layer_dropout: Alive
    """What dropout adds."""
    mlp_dora: Alive
    attention_dora: Alive
    """What the magnitudes of DoRA add."""
    mlp_full: Alive
    """What is different where all weights learn, without an adapter's own arrays."""
    logits: float
    """Arrays of a chunk's logits, and """
    logits_ahead: float
    """of those of the next chunk, which has been begun."""
    loss_beside: float
    """Hidden states of all tokens beside the loss, and """
    loss_left: float
    """layer by layer, arrays of the inner size that the last MLP has not yet given back when the loss begins."""
    in_flight: float = 0.0
    """Beside what is alive, so many times as much may be in flight on a GPU, up to what its buffers hold."""


ON_CPU = Counts(
    mlp=Alive(inner=16.0, wide=5.6, beside=3.5),
    attention=Alive(wide=15.4, keys=10.6, scores=3.2, beside=2.5),
    mlp_forward=Alive(inner=4.2, wide=1.0, beside=3.0),
    attention_forward=Alive(wide=7.1, keys=6.1, scores=1.05, beside=3.6),
    layer=Alive(inner=13.0, wide=16.2, scores=3.0),
    kept=Alive(inner=4.6, wide=9.0, scores=1.0),
    beside_kept=Alive(inner=11.0, wide=3.0, scores=2.0),
    mlp_dropout=Alive(inner=2.0, wide=1.7),
    attention_dropout=Alive(wide=3.0),
    layer_dropout=Alive(inner=0.5, wide=4.0),
    mlp_dora=Alive(inner=4.0, wide=3.0),
    attention_dora=Alive(wide=3.0),
    mlp_full=Alive(inner=-4.0, wide=-2.2),
    logits=6.0,
    logits_ahead=2.0,
    loss_beside=6.1,
    loss_left=1.8,
)

ON_GPU = Counts(
    mlp=Alive(inner=7.0, wide=6.0, beside=4.5),
    attention=Alive(wide=8.0, keys=6.0, beside=3.5),
    mlp_forward=Alive(inner=3.0, wide=2.0, beside=3.0),
    attention_forward=Alive(wide=6.0, keys=6.0, beside=3.0),
    layer=Alive(inner=7.0, wide=5.0),
    kept=Alive(inner=3.0, wide=9.0),
    beside_kept=Alive(inner=7.0, wide=3.0),
    mlp_dropout=Alive(inner=1.0, wide=1.0),
    attention_dropout=Alive(wide=2.0),
    layer_dropout=Alive(inner=5.0, wide=8.0),
    mlp_dora=Alive(inner=4.0, wide=3.0),
    attention_dora=Alive(wide=3.0),
    mlp_full=Alive(),
    logits=3.0,
    logits_ahead=1.0,
    loss_beside=4.0,
    loss_left=1.0,
    in_flight=1.2,
)

ON_METAL = replace(
    ON_GPU,
    attention=replace(ON_GPU.attention, scores=3.0),
    layer=replace(ON_GPU.layer, scores=3.0),
    kept=replace(ON_GPU.kept, scores=1.0),
    beside_kept=replace(ON_GPU.beside_kept, scores=2.0),
)
