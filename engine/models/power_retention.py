"""Power retention as a layer: projections and rotary positions around the op."""

from __future__ import annotations

from dataclasses import dataclass

from engine.backend import mx
from engine.ops.power_retention import power_retention, retention_step

import mlx.nn as nn


@dataclass(frozen=True)
class RetentionState:
    """What a layer remembers of the tokens before `position`; its size does not depend on their number.

    `memory` is [batch, kv_heads, features, head_dim + 1], None before the first token.
    """

    memory: mx.array | None = None
    position: int = 0


class PowerRetention(nn.Module):
    """Multi-head power retention with grouped keys and values and rotary positions.

    `__call__` takes whole sequences and leaves nothing behind. `step` streams: one token of each sequence of a batch,
    with a state for each of them that lasts until `reset`.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int | None = None,
        *,
        power: int = 2,
        chunk_size: int = 128,
        switch_over: int = 1024,
        rope_theta: float = 10_000.0,
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads or heads, width // heads
        self.power, self.chunk_size, self.switch_over, self.rope_theta = power, chunk_size, switch_over, rope_theta
        self.q_proj = nn.Linear(width, heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(width, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(width, self.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(heads * self.head_dim, width, bias=False)
        self._streamed = RetentionState()

    def __call__(self, x: mx.array, log_g: mx.array | None = None) -> mx.array:
        """Whole sequences from their first token: x [batch, time, width], log_g [batch, kv_heads, time] or None."""
        q, k, v = self._project(x, position=0)
        y = power_retention(q, k, v, log_g, power=self.power, chunk_size=self.chunk_size, switch_over=self.switch_over)
        return self._merge(y)

    def advance(self, x: mx.array, log_g: mx.array | None, state: RetentionState) -> tuple[mx.array, RetentionState]:
        """The next tokens after `state`, x [batch, time, width], and the state after them. Changes nothing here."""
        q, k, v = self._project(x, state.position)
        if x.shape[1] == 1:
            gate = None if log_g is None else log_g[..., 0]
            y, memory = retention_step(q[:, :, 0], k[:, :, 0], v[:, :, 0], gate, state.memory, power=self.power)
            y = y[:, :, None]
        else:
            y, memory = power_retention(
                q,
                k,
                v,
                log_g,
                power=self.power,
                chunk_size=self.chunk_size,
                switch_over=self.switch_over,
                initial_state=state.memory,
                return_state=True,
            )
        return self._merge(y), RetentionState(memory, state.position + x.shape[1])

    def step(self, x: mx.array, log_g: mx.array | None = None) -> mx.array:
        """The next token of each sequence: x [batch, width], log_g [batch, kv_heads] or None; gives [batch, width].

        Raises `ValueError` where the batch is not that of the tokens before; `reset` begins anew.
        """
        memory = self._streamed.memory
        if memory is not None and memory.shape[0] != x.shape[0]:
            raise ValueError(f"{x.shape[0]} sequences after {memory.shape[0]}: call reset() before a new batch")
        gate = None if log_g is None else log_g[..., None]
        y, self._streamed = self.advance(x[:, None], gate, self._streamed)
        return y.squeeze(1)

    def reset(self) -> None:
        """Forgets what `step` has seen."""
        self._streamed = RetentionState()

    def _project(self, x: mx.array, position: int) -> tuple[mx.array, mx.array, mx.array]:
        q, k, v = (
            projection(x).reshape(*x.shape[:2], -1, self.head_dim).swapaxes(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = (
            mx.fast.rope(array, self.head_dim, traditional=False, base=self.rope_theta, scale=1.0, offset=position)
            for array in (q, k)
        )
        return q, k, v

    def _merge(self, y: mx.array) -> mx.array:
        return self.o_proj(y.swapaxes(1, 2).flatten(-2))
