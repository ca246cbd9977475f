r"""A step of LoRA against mlx-lm's own trainer: tokens a second and peak memory, on the same machine, in one run.

    python tests/benchmarks/lora_step.py                 a small geometry, on a CPU
    python tests/benchmarks/lora_step.py --geometry qwen2.5-1.5b --dtype bfloat16 --length 2048 \\
        --cases default best whole layerwise         on a GPU

Weights and tokens are random, so nothing is downloaded; both learn rank 32 on all seven projections, with the dropout
of profiles/lora-m2-air-8gb.toml, and recompute each layer. Every case runs in a process of its own, in turn, `--rounds`
times; its first steps, which also compile, are left out. `best` is mlx-lm with MLX_MAX_MB_PER_BUFFER=64, which this
project sets by itself on NVIDIA; `default` is without. mlx-lm's peak is counted from the moment its training begins.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
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
RANK, ALPHA, DROPOUT = 32, 64, 0.05
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


def theirs(arguments: argparse.Namespace) -> dict[str, float]:
    """Tokens a second and peak of mlx_lm's `train`."""
    import numpy as np

    if arguments.case == "default":  # before anything of ours can change how MLX runs
        import mlx.core

        mlx.core.eval(mlx.core.zeros(1))
    from engine.backend import mx

    import mlx.optimizers as optim
    from mlx_lm.tuner.callbacks import TrainingCallback
    from mlx_lm.tuner.trainer import TrainingArgs, train
    from mlx_lm.tuner.utils import linear_to_lora_layers

    model = make_base(arguments)
    linear_to_lora_layers(
        model,
        len(model.layers),
        {
            "rank": RANK,
            "scale": ALPHA / RANK,
            "dropout": arguments.dropout,
            "keys": [f"self_attn.{name}" for name in TARGETS[:4]] + [f"mlp.{name}" for name in TARGETS[4:]],
        },
    )
    rng = np.random.default_rng(0)
    vocabulary = GEOMETRIES[arguments.geometry]["vocab_size"]
    rows = [(rng.integers(0, vocabulary, arguments.length + 1).tolist(), 0) for _ in range(arguments.batch)]
    reports: list[dict[str, float]] = []

    class Listen(TrainingCallback):
        def on_train_loss_report(self, train_info: dict[str, float]) -> None:
            reports.append(train_info)
            if arguments.skipped == len(reports):
                mx.reset_peak_memory()

    settings = TrainingArgs(
        batch_size=arguments.batch,
        iters=arguments.steps + arguments.skipped,
        val_batches=0,
        steps_per_report=1,
        steps_per_eval=10**9,
        steps_per_save=10**9,
        max_seq_length=arguments.length + 1,
        adapter_file="/dev/null",
        grad_checkpoint=True,
    )
    mx.reset_peak_memory()
    try:
        train(model, optim.AdamW(1e-4), rows, None, args=settings, training_callback=Listen())
    except RuntimeError:  # it wants to save at its end
        if len(reports) < settings.iters:
            raise
    kept = reports[arguments.skipped :]
    return {
        "tokens_per_second": median(report["tokens_per_second"] for report in kept),
        "peak_bytes": mx.get_peak_memory(),
        "loss": kept[-1]["train_loss"],
    }


def ours(arguments: argparse.Namespace) -> dict[str, float]:
    """Tokens a second and peak of our update, whole or layer by layer."""
    from engine.backend import mx, on_gpu
    from engine.planning.rehearsal_lora import LoRARehearsal
    from engine.profile import LoRAProfile, parse_profile
    from engine.ranks import Ranks
    from engine.update import Update

    folder = tempfile.TemporaryDirectory()
    Path(folder.name, "config.json").write_text(json.dumps(config(arguments.geometry, arguments.bits)))
    table = {
        "kind": "lora",
        "model": {"init_from": folder.name},
        "adapter": {"rank": RANK, "alpha": ALPHA, "dropout": arguments.dropout, "targets": TARGETS},
        "data": {"builtin": "python-docs"},
        "train": {
            "steps": 1,
            "batch_size": arguments.batch,
            "micro_batch_size": arguments.batch,
            "sequence_length": arguments.length,
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
    mx.reset_peak_memory()
    for step in range(arguments.steps + arguments.skipped):
        if step == arguments.skipped:
            mx.reset_peak_memory()
        batch = task.batch(range(arguments.batch))
        began = time.perf_counter()
        update.accumulate(batch, seed=step)
        gradient = update.collect()
        update.apply(gradient, 1e-4)
        seconds.append(time.perf_counter() - began)
    return {
        "tokens_per_second": batch.real / median(seconds[arguments.skipped :]),
        "peak_bytes": mx.get_peak_memory(),
        "loss": gradient.loss,
    }


def run_case(arguments: argparse.Namespace, case: str, bits: int, batch: int) -> dict[str, float] | None:
    """A case in a process of its own; None where it failed, and said why."""
    command = [sys.executable, __file__, "--case", case, "--bits", str(bits), "--batch", str(batch)]
    for name in ("geometry", "length", "dtype", "steps", "skipped", "dropout"):
        command += [f"--{name}", str(getattr(arguments, name))]
    environment = {name: value for name, value in os.environ.items() if name != "MLX_MAX_MB_PER_BUFFER"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        print(f"{case}, {bits} bits, {batch} at once: {done.stderr.strip().splitlines()[-1:]}", flush=True)
        return None
    return json.loads(lines[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", choices=GEOMETRIES, default="small")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch", type=int, nargs="+", default=[4, 1])
    parser.add_argument("--bits", type=int, nargs="+", default=[16, 4])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--skipped", type=int, default=SKIPPED)
    parser.add_argument("--dropout", type=float, default=DROPOUT)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=ON_CPU)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        arguments.bits, arguments.batch = arguments.bits[0], arguments.batch[0]
        found = theirs(arguments) if arguments.case in ("default", "best") else ours(arguments)
        print(json.dumps(found), flush=True)
        return
    print(f"{arguments.geometry}, {arguments.dtype}, sequences of {arguments.length:,}, dropout {arguments.dropout:g}")
    print(f"{'bits':>5}{'batch':>7}{'way':>12}{'tok/s':>10}{'peak GB':>9}{'speed':>8}{'peak':>7}   of mlx-lm's best")
    for bits in arguments.bits:
        for batch in arguments.batch:
            found: dict[str, list[dict[str, float]]] = {case: [] for case in arguments.cases}
            for _ in range(arguments.rounds):
                for case in arguments.cases:
                    if (result := run_case(arguments, case, bits, batch)) is not None:
                        found[case].append(result)
            best = found.get("best") or found.get("default")
            for case, results in found.items():
                if not results:
                    continue
                speed = median(result["tokens_per_second"] for result in results)
                peak = max(result["peak_bytes"] for result in results)
                ratios = ""
                if best:
                    theirs_speed = median(result["tokens_per_second"] for result in best)
                    theirs_peak = max(result["peak_bytes"] for result in best)
                    ratios = f"{speed / theirs_speed:8.2f}{peak / theirs_peak:7.2f}"
                print(f"{bits:5}{batch:7}{case:>12}{speed:10,.0f}{peak / 1e9:9.2f}{ratios}", flush=True)


if __name__ == "__main__":
    main()
