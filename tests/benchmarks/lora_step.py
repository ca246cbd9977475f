r"""A step of LoRA against mlx-lm's own trainer: tokens a second and peak memory, on the same machine, in one run.

    python tests/benchmarks/lora_step.py                 a small geometry, on a CPU
    python tests/benchmarks/lora_step.py --geometry qwen2.5-1.5b --dtype bfloat16 --shapes 4x2048 1x2048 \\
        --cases default best whole layerwise         on a GPU

Weights and tokens are random, so nothing is downloaded; both learn rank 32 on all seven projections and recompute each
layer. Every case runs in a process of its own, in turn, `--rounds` times; its first steps, which also compile, are left
out. `best` is mlx-lm with MLX_MAX_MB_PER_BUFFER=64, which this project sets by itself on NVIDIA; `default` is without.
Peaks are those of the steps that count, with the model in memory.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

GEOMETRIES: dict[str, dict[str, Any]] = {
    "qwen2.5-1.5b": {
        "hidden_size": 1536,
        "num_hidden_layers": 28,
        "intermediate_size": 8960,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151_936,
        "rope_theta": 1_000_000.0,
    },
    "small": {
        "hidden_size": 256,
        "num_hidden_layers": 6,
        "intermediate_size": 1024,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": 16_384,
        "rope_theta": 10_000.0,
    },
}
RANK, ALPHA = 32, 64
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SKIPPED = 2
"""Steps that also compile, or fill the allocator."""

ON_CPU = ["best", "whole", "layerwise"]
"""`default` would be without the fast BLAS there."""

CASES = ["default", *ON_CPU]


def config(geometry: str, bits: int) -> dict[str, Any]:
    """config.json of a geometry, quantized to `bits` unless they are 16."""
    table = {"model_type": "qwen2", "rms_norm_eps": 1e-6, "tie_word_embeddings": True, **GEOMETRIES[geometry]}
    return table if bits == 16 else {**table, "quantization": {"group_size": 64, "bits": bits}}


def make_base(arguments: argparse.Namespace) -> Any:
    """The model with random weights in memory, as a loader would leave it."""
    from engine.backend import mx
    from engine.models.pretrained import cast, instantiate

    mx.random.seed(0)
    model = instantiate(config(arguments.geometry, arguments.bits))
    cast(model, getattr(mx, arguments.dtype))
    for layer in model.layers:  # not all at once: before they are cast they are larger
        mx.eval(layer.parameters())
    mx.eval(model.parameters())
    mx.clear_cache()
    return model


def theirs(arguments: argparse.Namespace) -> Iterator[dict[str, float]]:
    """Tokens a second and peak of mlx_lm's `train`, for each shape."""
    if arguments.case == "default":  # before anything of ours can change how MLX runs
        import mlx.core

        mlx.core.eval(mlx.core.zeros(1))
    import numpy as np

    from engine.backend import mx

    import mlx.optimizers as optim
    from mlx_lm.tuner.callbacks import TrainingCallback
    from mlx_lm.tuner.trainer import TrainingArgs, train
    from mlx_lm.tuner.utils import linear_to_lora_layers

    model = make_base(arguments)
    keys = [f"self_attn.{name}" for name in TARGETS[:4]] + [f"mlp.{name}" for name in TARGETS[4:]]
    settings = {"rank": RANK, "scale": ALPHA / RANK, "dropout": arguments.dropout, "keys": keys}
    linear_to_lora_layers(model, len(model.layers), settings)
    vocabulary = GEOMETRIES[arguments.geometry]["vocab_size"]
    for number, (batch, length) in enumerate(arguments.shapes):
        rng = np.random.default_rng(0)
        rows = [(rng.integers(0, vocabulary, length + 1).tolist(), 0) for _ in range(batch)]
        reports: list[dict[str, float]] = []

        class Listen(TrainingCallback):
            def on_train_loss_report(self, train_info: dict[str, float], reports: Any = reports) -> None:
                reports.append(train_info)
                if arguments.skipped == len(reports):
                    mx.reset_peak_memory()

        options = TrainingArgs(
            batch_size=batch,
            iters=arguments.steps + arguments.skipped,
            val_batches=0,
            steps_per_report=1,
            steps_per_eval=10**9,
            steps_per_save=10**9,
            max_seq_length=length + 1,
            adapter_file=f"{tempfile.mkdtemp()}/adapters.safetensors",
            grad_checkpoint=number == 0,  # it changes the layers' class, for good
        )
        with contextlib.redirect_stdout(io.StringIO()):
            train(model, optim.AdamW(1e-4), rows, None, args=options, training_callback=Listen())
        yield {
            "tokens_per_second": median(report["tokens_per_second"] for report in reports[arguments.skipped :]),
            "peak_bytes": mx.get_peak_memory(),
        }


def ours(arguments: argparse.Namespace) -> Iterator[dict[str, float]]:
    """Tokens a second and peak of our update, whole or layer by layer, for each shape."""
    from engine.backend import mx, on_gpu
    from engine.planning.rehearsal_lora import LoRARehearsal
    from engine.profile import LoRAProfile, parse_profile
    from engine.ranks import Ranks
    from engine.update import Update

    folder = tempfile.TemporaryDirectory()
    Path(folder.name, "config.json").write_text(json.dumps(config(arguments.geometry, arguments.bits)))
    for batch, length in arguments.shapes:
        table = {
            "kind": "lora",
            "model": {"init_from": folder.name},
            "adapter": {"rank": RANK, "alpha": ALPHA, "dropout": arguments.dropout, "targets": TARGETS},
            "data": {"builtin": "python-docs"},
            "train": {
                "steps": 1,
                "batch_size": batch,
                "micro_batch_size": batch,
                "sequence_length": length,
                "backward": arguments.case,
                "dtype": arguments.dtype,
            },
        }
        profile = parse_profile(table)
        assert isinstance(profile, LoRAProfile)
        task = LoRARehearsal(profile)
        update = Update(task, profile.train, Ranks(), getattr(mx, arguments.dtype), compiled=on_gpu(), warn=print)
        update.restore(task.initial_parameters(), None)
        seconds: list[float] = []
        for step in range(arguments.steps + arguments.skipped):
            if step == arguments.skipped:
                mx.reset_peak_memory()
            rows = task.batch(range(batch))
            began = time.perf_counter()
            update.accumulate(rows, seed=step)
            update.apply(update.collect(), 1e-4)
            seconds.append(time.perf_counter() - began)
        yield {
            "tokens_per_second": batch * length / median(seconds[arguments.skipped :]),
            "peak_bytes": mx.get_peak_memory(),
        }
        del task, update
        gc.collect()
        mx.clear_cache()


def run_case(arguments: argparse.Namespace, case: str, bits: int) -> list[dict[str, float]]:
    """A case in a process of its own: its result for each shape; fewer where it failed, and said why."""
    command = [sys.executable, __file__, "--case", case, "--bits", str(bits), "--shapes"]
    command += [f"{batch}x{length}" for batch, length in arguments.shapes]
    for name in ("geometry", "dtype", "steps", "skipped", "dropout"):
        command += [f"--{name}", str(getattr(arguments, name))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"{case}, {bits} bits: {''.join(done.stderr.strip().splitlines()[-1:])}", flush=True)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def print_table(arguments: argparse.Namespace, bits: int, found: dict[str, list[list[dict[str, float]]]]) -> None:
    """A line for each case and shape; the ratios are to mlx-lm at its best."""
    for number, (batch, length) in enumerate(arguments.shapes):
        known = {
            case: [results[number] for results in rounds if number < len(results)] for case, rounds in found.items()
        }
        best = known.get("best") or known.get("default")
        for case, results in known.items():
            if not results or not best:
                continue
            speed, peak = _speed(results), _peak(results)
            print(
                f"{bits:5}{f'{batch}x{length:,}':>10}{case:>12}{speed:10,.0f}{peak / 1e9:9.2f}"
                f"{speed / _speed(best):8.2f}{peak / _peak(best):7.2f}",
                flush=True,
            )


def _speed(results: list[dict[str, float]]) -> float:
    return median(result["tokens_per_second"] for result in results)


def _peak(results: list[dict[str, float]]) -> float:
    return max(result["peak_bytes"] for result in results)


def _shape(text: str) -> tuple[int, int]:
    batch, _, length = text.partition("x")
    return int(batch), int(length)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", choices=GEOMETRIES, default="small")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--shapes", type=_shape, nargs="+", default=[(4, 512), (1, 512)], help="sequences x tokens")
    parser.add_argument("--bits", type=int, nargs="+", default=[16, 4], help="16 is not quantized")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--skipped", type=int, default=SKIPPED)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=ON_CPU)
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        arguments.bits = arguments.bits[0]
        for result in (theirs if arguments.case in ("default", "best") else ours)(arguments):
            print(json.dumps(result), flush=True)
        return
    print(f"{arguments.geometry}, {arguments.dtype}, dropout {arguments.dropout:g}; ratios to mlx-lm at its best")
    print(f"{'bits':>5}{'shape':>10}{'way':>12}{'tok/s':>10}{'peak GB':>9}{'speed':>8}{'peak':>7}")
    for bits in arguments.bits:
        found: dict[str, list[list[dict[str, float]]]] = {case: [] for case in arguments.cases}
        for _ in range(arguments.rounds):
            for case in arguments.cases:
                found[case].append(run_case(arguments, case, bits))
        print_table(arguments, bits, found)


if __name__ == "__main__":
    main()
