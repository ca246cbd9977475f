"""Sampling for any model that predicts tokens from a state: one of constant size, or caches that grow."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any, Protocol

from engine.backend import mx, scalar

PROMPT_PIECE_TOKENS = 64
"""How much of a prompt is read at once: short, because training waits meanwhile."""


class Predictor(Protocol):
    """A model with a state."""

    def forward(self, tokens: mx.array, states: Any | None = None) -> tuple[mx.array, Any]:
        """Logits [batch, vocabulary] after the next tokens [batch, time], and the state after them."""
        ...


def generate(
    model: Predictor,
    prompt: Sequence[int],
    *,
    max_tokens: int,
    temperature: float = 0.7,
    top_p: float = 0.9,
    seed: int = 0,
    ends: Collection[int] = (),
    vocabulary: int | None = None,
) -> Iterator[int | None]:
    """Tokens that follow a prompt, one a call; None for each piece of the prompt that was read before the first.

    Temperature 0 takes the likeliest token. Ends after `max_tokens`, or before one of `ends`, which is not given out.
    Ids from `vocabulary` on are never given out: a tokenizer may fill fewer rows than the model has.
    Draws from keys of its own, never from MLX's global random state. Raises `ValueError` for an empty prompt.
    """
    if not prompt:
        raise ValueError("the prompt is empty: at least one token is needed to begin with")
    states: Any | None = None
    for start in range(0, len(prompt), PROMPT_PIECE_TOKENS):
        logits, states = model.forward(mx.array([prompt[start : start + PROMPT_PIECE_TOKENS]]), states)
        mx.eval(logits)
        yield None
    key = mx.random.key(seed)
    for made in range(max_tokens):
        key, now = mx.random.split(key)
        token = int(scalar(sample(logits[0, :vocabulary], temperature, top_p, now)))
        if token in ends:
            return
        yield token
        if made + 1 < max_tokens:
            logits, states = model.forward(mx.array([[token]]), states)


def sample(logits: mx.array, temperature: float, top_p: float, key: mx.array) -> mx.array:
    """A token id from logits [vocabulary].

    The likeliest one at temperature 0; else drawn from the fewest likeliest tokens whose probabilities add up to at
    least `top_p` (nucleus sampling, arXiv 1904.09751).
    """
    if temperature == 0:
        return mx.argmax(logits)
    scaled = logits.astype(mx.float32) / temperature
    if top_p < 1:
        order = mx.argsort(-scaled)
        probabilities = mx.softmax(scaled[order])
        before = mx.cumsum(probabilities) - probabilities
        inside = before < max(top_p, 1e-9)  # the likeliest is always in
        return order[mx.random.categorical(mx.where(inside, scaled[order], -mx.inf), key=key)]
    return mx.random.categorical(scaled, key=key)
