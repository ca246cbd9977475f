"""A language model on power retention: RMSNorm, gated retention with rotary positions, SwiGLU, tied embeddings."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from engine.backend import mx
from engine.errors import UserError
from engine.models.power_retention import PowerRetention, RetentionState
from engine.ops.recompute import recomputed_layer

import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

MODEL_TYPE = "power-retention"
GATE_BIAS = 6.9
"""A fresh gate is sigmoid(6.9) = 0.999: a memory of about a thousand tokens."""

_INITIAL_STD = 0.02
_OF_WIDTH = 1280
"""GPT-2's spread of weights at its largest width; narrower layers, which add up less, need a larger one."""


@dataclass(frozen=True)
class RetentionLMConfig:
    """Shape of the model; kv_heads and hidden are filled in where they are None."""

    width: int
    layers: int
    heads: int
    vocab_size: int
    kv_heads: int | None = None
    hidden: int | None = None
    power: int = 2
    chunk_size: int = 128
    switch_over: int = 1024
    rope_theta: float = 10_000.0

    def __post_init__(self) -> None:
        if self.kv_heads is None:
            object.__setattr__(self, "kv_heads", self.heads)
        if self.hidden is None:
            object.__setattr__(self, "hidden", math.ceil(self.width * 8 / 3 / 64) * 64)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) · up(x)) (arXiv 2002.05202)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """x + retention(norm(x)), then x + mlp(norm(x)); one gate for each key-value head."""

    def __init__(self, config: RetentionLMConfig) -> None:
        super().__init__()
        assert config.kv_heads is not None and config.hidden is not None
        self.retention_norm = nn.RMSNorm(config.width)
        self.gate = nn.Linear(config.width, config.kv_heads, bias=False)
        self.retention = PowerRetention(
            config.width,
            config.heads,
            config.kv_heads,
            power=config.power,
            chunk_size=config.chunk_size,
            switch_over=config.switch_over,
            rope_theta=config.rope_theta,
        )
        self.mlp_norm = nn.RMSNorm(config.width)
        self.mlp = SwiGLU(config.width, config.hidden)

    def __call__(self, x: mx.array) -> mx.array:
        """x: [batch, time, width]."""
        return self.transform(self.retain(x))

    def retain(self, x: mx.array) -> mx.array:
        """The first half: tokens learn of those before them."""
        normed = self.retention_norm(x)
        return x + self.retention(normed, self._log_gates(normed))

    def transform(self, x: mx.array) -> mx.array:
        """The second half: every token for itself."""
        return x + self.mlp(self.mlp_norm(x))

    def advance(self, x: mx.array, state: RetentionState) -> tuple[mx.array, RetentionState]:
        """As `__call__`, for the tokens after `state`."""
        normed = self.retention_norm(x)
        retained, state = self.retention.advance(normed, self._log_gates(normed), state)
        return self.transform(x + retained), state

    def _log_gates(self, x: mx.array) -> mx.array:
        """[batch, kv_heads, time], in float32: a product of many gates needs its digits."""
        return nn.log_sigmoid(self.gate(x).astype(mx.float32) + GATE_BIAS).swapaxes(1, 2)


class RetentionLM(nn.Module):
    """Tokens in, logits over the next token out. With `gradient_checkpointing` each layer keeps only its input."""

    def __init__(self, config: RetentionLMConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.layers = [Block(config) for _ in range(config.layers)]
        self.norm = nn.RMSNorm(config.width)
        self._initialise()

    def __call__(self, tokens: mx.array) -> mx.array:
        """Logits [batch, time, vocabulary] of whole sequences of token ids [batch, time]."""
        return self.embedding.as_linear(self.hidden_states(tokens))

    def hidden_states(self, tokens: mx.array) -> mx.array:
        """What the output layer (the embedding) reads: [batch, time, width]."""
        x = self.embedding(tokens)
        for layer in self.layers:
            x = recomputed_layer(layer, x) if self.gradient_checkpointing else layer(x)
        return self.norm(x)

    def forward(
        self, tokens: mx.array, states: Sequence[RetentionState] | None = None
    ) -> tuple[mx.array, list[RetentionState]]:
        """Logits [batch, vocabulary] after the last of the next tokens [batch, time], and the states after it.

        `states` are those of the tokens before, one a layer; None at the beginning.
        """
        x = self.embedding(tokens)
        after: list[RetentionState] = []
        for layer, before in zip(self.layers, states or [RetentionState()] * len(self.layers), strict=True):
            x, state = layer.advance(x, before)
            after.append(state)
        return self.embedding.as_linear(self.norm(x[:, -1])), after

    def save(self, folder: Path) -> None:
        """Writes config.json and model.safetensors."""
        config = {"model_type": MODEL_TYPE, "architectures": [type(self).__name__], "tie_word_embeddings": True}
        (folder / "config.json").write_text(json.dumps(config | asdict(self.config), indent=2) + "\n", encoding="utf-8")
        weights = dict(tree_flatten(self.parameters()))
        mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})

    @classmethod
    def load(cls, folder: Path) -> Self:
        """The model of a folder that `save` wrote. Raises `UserError` where it is something else or incomplete."""
        try:
            table: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            if table.get("model_type") != MODEL_TYPE:
                raise UserError(f"{folder}: its model_type is {table.get('model_type')!r}, should be {MODEL_TYPE!r}")
            known = RetentionLMConfig.__dataclass_fields__
            model = cls(RetentionLMConfig(**{name: value for name, value in table.items() if name in known}))
            model.load_weights(str(folder / "model.safetensors"))
            mx.eval(model.parameters())
        except (OSError, RuntimeError, ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{folder}: its model cannot be loaded: {' '.join(str(error).split())}") from None
        return model

    def _initialise(self) -> None:
        """Normal weights, σ ∝ 1/√width; those that write to the residual stream smaller, by the number of writers."""
        normal = _INITIAL_STD * math.sqrt(_OF_WIDTH / self.config.width)
        for name, array in tree_flatten(self.parameters()):
            if array.ndim < 2:
                continue
            writes = name.endswith(("o_proj.weight", "down_proj.weight"))
            std = normal / math.sqrt(2 * len(self.layers)) if writes else normal
            self.update(tree_unflatten([(name, mx.random.normal(array.shape, scale=std))]))
