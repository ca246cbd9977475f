"""The chunked against the attention form of power retention: time and peak memory of a forward and backward pass.

    python tests/benchmarks/retention_forms.py [--heads 2] [--head-dim 32] [--chunk-size 128] [--device gpu]

Both forms run in turn, so that a busy machine slows both; a ratio is the median over the pairs. "Growth" is what twice
the tokens cost: 2 for a linear form, 4 for a quadratic one.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import median
from time import perf_counter

from engine.backend import BLAS, device_words, mx
from engine.ops.power_retention import power_retention

Pass = Callable[[], None]


def forward_and_backward(arrays: list[mx.array], switch_over: int, chunk_size: int) -> Pass:
    def loss(*values: mx.array) -> mx.array:
        return mx.square(power_retention(*values, switch_over=switch_over, chunk_size=chunk_size)).sum()

    gradients = mx.value_and_grad(loss, argnums=range(4))
    return lambda: mx.eval(gradients(*arrays))


def seconds_and_peak_bytes(run: Pass) -> tuple[float, int]:
    """The time of a pass, and the memory that it needs beside its inputs."""
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    start = perf_counter()
    run()
    return perf_counter() - start, mx.get_peak_memory() - before


def measure(time: int, options: argparse.Namespace) -> tuple[float, float, float, float, float]:
    """Median seconds (attention, chunked), median ratio of the pairs, peak bytes (attention, chunked)."""
    mx.random.seed(0)
    shape = (1, options.heads, time, options.head_dim)
    arrays = [mx.random.normal(shape) for _ in range(3)]
    arrays.append(-0.02 * mx.random.uniform(shape=shape[:-1]))
    mx.eval(arrays)
    attention = forward_and_backward(arrays, time, options.chunk_size)
    chunked = forward_and_backward(arrays, 0, options.chunk_size)
    pairs = []
    for _ in range(1 + options.passes // time):
        pairs.append((*seconds_and_peak_bytes(attention), *seconds_and_peak_bytes(chunked)))
    of_attention, attention_bytes, of_chunked, chunked_bytes = (median(column) for column in zip(*pairs, strict=True))
    return of_attention, of_chunked, median(a / c for a, _, c, _ in pairs), attention_bytes, chunked_bytes


def growth(now: float, before: float | None) -> str:
    return f"{now / before:6.2f}" if before else " " * 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=32)
    parser.add_argument("--chunk-size", type=int, default=128, metavar="TOKENS")
    parser.add_argument("--device", choices=["cpu", "gpu"], help="MLX's default if absent")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192], metavar="TOKENS")
    parser.add_argument("--passes", type=int, default=4096, help="passes = 1 + this / tokens, for each form")
    options = parser.parse_args()
    if options.device:
        mx.set_default_device(getattr(mx, options.device))

    print(f"device {device_words()}, BLAS {BLAS}")
    print(
        f"batch 1, {options.heads} heads of {options.head_dim}, float32, gated, chunks of {options.chunk_size} tokens"
    )
    print(f"\n{'':6} {'attention form':>31} {'chunked form':>31} {'attention / chunked':>20}")
    form = f"{'seconds':>10} {'growth':>6} {'MB':>6} {'growth':>6}"
    print(f"tokens {form} {form} {'time':>10} {'memory':>9}")
    before: list[float | None] = [None] * 4
    for time in options.lengths:
        attention, chunked, ratio, attention_bytes, chunked_bytes = measure(time, options)
        now = [attention, attention_bytes, chunked, chunked_bytes]
        row = [f"{time:6}"]
        for index, value in enumerate(now):
            row.append(f"{value / 1e6:6.0f}" if index % 2 else f"{value:10.3f}")
            row.append(growth(value, before[index]))
        print(*row, f"{ratio:9.2f}x {attention_bytes / chunked_bytes:8.1f}x", flush=True)
        before = list(now)


if __name__ == "__main__":
    main()
