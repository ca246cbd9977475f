"""How well the planner knows MLX's peak: predicted, measured, and their ratio; each case in a process of its own.

    python tests/benchmarks/plan_accuracy.py [--quick] [--profile retention-tiny]

A step is taken of each: accumulate, collect, apply, with random tokens; on GPUs up to ten, of which the largest peak
counts, because how far MLX runs ahead of a GPU differs from step to step. Lengths are below and beyond `switch_over`,
where retention goes from its attention form to its chunked one. `--quick` leaves out retention-small, whose steps take
tens of seconds on two cores. A GPU gets cases of its own, as large as it likes them.
"""

from __future__ import annotations

import argparse

from engine.backend import on_gpu
from engine.planner import plan
from engine.planning.measure import measure
from engine.profile_files import load_profile

# Profile, sequences at once, sequences a step, tokens each, switch_over, gradient checkpointing.
ON_CPU = [
    ("retention-ultra-tiny", 8, 8, 128, 1024, False),
    ("retention-ultra-tiny", 32, 32, 128, 1024, False),
    ("retention-ultra-tiny", 32, 32, 128, 1024, True),
    ("retention-ultra-tiny", 4, 8, 512, 256, False),
    ("retention-ultra-tiny", 4, 8, 512, 256, True),
    ("retention-ultra-tiny", 2, 4, 2048, 1024, False),
    ("demo", 8, 8, 128, 1024, False),
    ("demo", 2, 8, 128, 1024, True),
    ("retention-tiny", 1, 1, 256, 1024, False),
    ("retention-tiny", 2, 4, 256, 1024, True),
    ("retention-tiny", 4, 8, 256, 1024, False),
    ("retention-tiny", 4, 8, 256, 1024, True),
    ("retention-tiny", 8, 16, 256, 1024, False),
    ("retention-tiny", 2, 4, 1024, 1024, False),
    ("retention-tiny", 1, 2, 2048, 1024, False),
    ("retention-tiny", 1, 2, 2048, 1024, True),
    ("retention-small", 1, 1, 256, 1024, False),
    ("retention-small", 1, 2, 512, 1024, False),
    ("retention-small", 2, 2, 256, 1024, True),
    ("retention-small", 1, 2, 512, 256, False),
]
ON_GPU = [
    ("retention-ultra-tiny", 32, 32, 128, 1024, False),
    ("retention-ultra-tiny", 32, 32, 128, 1024, True),
    ("retention-ultra-tiny", 128, 256, 128, 1024, False),
    ("retention-ultra-tiny", 256, 512, 128, 1024, True),
    ("retention-ultra-tiny", 16, 32, 2048, 1024, False),
    ("retention-ultra-tiny", 16, 32, 2048, 1024, True),
    ("demo", 64, 64, 128, 1024, False),
    ("demo", 64, 64, 128, 1024, True),
    ("demo", 256, 256, 128, 1024, False),
    ("retention-tiny", 2, 4, 512, 1024, False),
    ("retention-tiny", 8, 32, 256, 1024, False),
    ("retention-tiny", 8, 32, 256, 1024, True),
    ("retention-tiny", 32, 32, 256, 1024, False),
    ("retention-tiny", 32, 64, 1024, 1024, False),
    ("retention-tiny", 32, 64, 1024, 1024, True),
    ("retention-tiny", 64, 64, 512, 1024, True),
    ("retention-tiny", 8, 16, 2048, 1024, False),
    ("retention-tiny", 8, 16, 2048, 1024, True),
    ("retention-small", 1, 2, 256, 1024, False),
    ("retention-small", 4, 64, 1024, 1024, False),
    ("retention-small", 4, 64, 1024, 1024, True),
    ("retention-small", 8, 16, 512, 1024, False),
    ("retention-small", 16, 16, 1024, 1024, False),
    ("retention-small", 16, 16, 1024, 1024, True),
    ("retention-small", 32, 64, 1024, 1024, True),
    ("retention-small", 8, 16, 1024, 256, False),
    ("retention-small", 16, 32, 1024, 256, True),
    ("retention-small", 4, 8, 2048, 1024, False),
    ("retention-small", 16, 32, 2048, 1024, True),
    ("retention-small", 1, 2, 8192, 1024, True),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="without retention-small")
    parser.add_argument("--profile", help="only the cases of this profile")
    options = parser.parse_args()
    print(f"{'profile':<21}{'at once':>8}{'a step':>8}{'tokens':>8}  {'form':<10}{'checkpointing':<14}", end="")
    print(f"{'predicted':>11}{'measured':>11}{'ratio':>7}")
    worst, enough = 0.0, 2 if on_gpu() else 0
    for name, at_once, batch, length, switch_over, checkpointing in ON_GPU if on_gpu() else ON_CPU:
        if (options.quick and name == "retention-small") or options.profile not in (None, name):
            continue
        settings = {
            "train.micro_batch_size": at_once,
            "train.batch_size": batch,
            "train.sequence_length": length,
            "train.gradient_checkpointing": str(checkpointing).lower(),
            "model.switch_over": switch_over,
        }
        profile = load_profile(name, [f"{key}={value}" for key, value in settings.items()])
        predicted, measured = plan(profile).predicted_peak_bytes, measure(profile, seconds=enough).peak_bytes
        ratio = predicted / measured
        worst = max(worst, abs(ratio - 1))
        form = "chunked" if length > switch_over else "attention"
        print(f"{name:<21}{at_once:>8}{batch:>8}{length:>8}  {form:<10}{'on' if checkpointing else 'off':<14}", end="")
        print(f"{predicted / 1e6:>8,.0f} MB{measured / 1e6:>8,.0f} MB{ratio:>7.2f}", flush=True)
    print(f"furthest off: {100 * worst:.0f} %  (at most 10 %)")


if __name__ == "__main__":
    main()
