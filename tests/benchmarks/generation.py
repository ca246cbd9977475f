"""Time a token when generating after a short and after a long context: the state has one size, so it is the same.

    python tests/benchmarks/generation.py [--short 100] [--long 10000] [--rounds 20] [PROFILE]

Both contexts are read first; then pieces of the two answers are generated in turn, so that a busy machine slows both.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import islice
from statistics import median
from time import perf_counter

from engine.backend import BLAS, device_words, mx
from engine.generate import generate
from engine.models.retention_lm import RetentionLM
from engine.profile_files import load_profile
from engine.tasks.retention_lm import model_config

PIECE_TOKENS = 25


def answer_after(model: RetentionLM, context_tokens: int, tokens: int) -> Iterator[int | None]:
    """An answer whose context has been read, with its first token out."""
    prompt = [index * 7919 % model.config.vocab_size for index in range(context_tokens)]
    answer = generate(model, prompt, max_tokens=tokens + 1, temperature=1.0, top_p=1.0)
    next(token for token in answer if token is not None)
    return answer


def seconds_a_token(answer: Iterator[int | None]) -> float:
    start = perf_counter()
    made = len(list(islice(answer, PIECE_TOKENS)))
    return (perf_counter() - start) / made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("profile", nargs="?", default="demo")
    parser.add_argument("--short", type=int, default=100, metavar="TOKENS")
    parser.add_argument("--long", type=int, default=10_000, metavar="TOKENS")
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()

    mx.random.seed(0)
    model = RetentionLM(model_config(load_profile(options.profile).model))
    tokens = options.rounds * PIECE_TOKENS
    short, long = (answer_after(model, context, tokens) for context in (options.short, options.long))
    pairs = [(seconds_a_token(short), seconds_a_token(long)) for _ in range(options.rounds)]
    after_short, after_long = (median(column) for column in zip(*pairs, strict=True))
    print(f"{options.profile} on {device_words()}, BLAS {BLAS}; medians of {options.rounds} rounds of {PIECE_TOKENS}")
    print(f"after {options.short:6,} tokens  {1e3 * after_short:7.2f} ms a token")
    print(f"after {options.long:6,} tokens  {1e3 * after_long:7.2f} ms a token")
    print(f"ratio {median(long / short for short, long in pairs):.3f}  (at most 1.1)")


if __name__ == "__main__":
    main()
