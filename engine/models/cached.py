"""A model of mlx-lm's that answers: with its own kinds of caches, its chat template, and its ends."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from engine.backend import mx
from engine.commands import Generate
from engine.generate import generate

import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache


class CachedModel:
    """See `engine.generate.Predictor`; the state is mlx-lm's caches, one a layer, which grow with the text."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def forward(self, tokens: mx.array, states: Any | None = None) -> tuple[mx.array, Any]:
        caches = make_prompt_cache(self._model) if states is None else states
        return self._model(tokens, cache=caches)[:, -1], caches


def speak(model: nn.Module, tokenizer: Any, ask: Generate) -> Iterator[str | None]:
    """Answers a prompt piece by piece; None while it is still being read. `tokenizer` is mlx-lm's wrapper.

    The prompt is a user's message where the tokenizer has a chat template, else a text to go on from.
    """
    detokenizer = tokenizer.detokenizer
    tokens = generate(
        CachedModel(model),
        prompt_tokens(tokenizer, ask.prompt),
        max_tokens=ask.max_tokens,
        temperature=ask.temperature,
        top_p=ask.top_p,
        seed=ask.seed,
        ends=tokenizer.eos_token_ids,
        vocabulary=1 + max(tokenizer.get_vocab().values()),  # its ids may have holes
    )
    piece: str | None = None  # kept back for one token: the last one has what is left at the end, so pieces are tokens
    for token in tokens:
        if token is None:
            yield None
            continue
        if piece is not None:
            yield piece
        detokenizer.add_token(token)
        piece = detokenizer.last_segment
    if piece is not None:
        detokenizer.finalize()
        yield piece + detokenizer.last_segment


def prompt_tokens(tokenizer: Any, prompt: str) -> list[int]:
    """What the model reads: the templated message with the beginning of an answer, or the plain text."""
    if tokenizer.has_chat_template:
        messages = [{"role": "user", "content": prompt}]
        return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True))
    return list(tokenizer.encode(prompt)) or [tokenizer.eos_token_id]
