"""How well the planner knows the peak of a fine-tuning step, as plan_accuracy.py does it for pretraining.

    python tests/benchmarks/plan_accuracy_lora.py [--only layerwise]

Bases of random weights in the shape of Qwen2's and Llama's, both ways backward, rows as long as they may be. Each case
is measured in a process of its own. A GPU gets cases of its own, in the shape of Qwen2.5-1.5B.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from engine.backend import on_gpu
from engine.planner import plan
from engine.planning.measure import measure
from engine.profile import Profile, parse_profile

SMALL = {"model_type": "qwen2", "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "max_position_embeddings": 4096}
QWEN_1_5B = SMALL | {
    "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
    "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151_936,
}  # fmt: skip


def small(width: int, inner: int, layers: int, heads: int, kv_heads: int, vocabulary: int, kind: str = "qwen2") -> Any:
    sizes = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers, "vocab_size": vocabulary}
    return SMALL | sizes | {"model_type": kind, "num_attention_heads": heads, "num_key_value_heads": kv_heads}


# Base, backward, sequences at once, micro-batches a step, tokens each, rank, other settings.
ON_CPU: list[tuple[dict[str, Any], str, int, int, int, int, dict[str, Any]]] = [
    (small(256, 1024, 4, 4, 2, 2_000), "whole", 1, 1, 512, 8, {}),
    (small(256, 1024, 4, 4, 2, 2_000), "whole", 4, 2, 256, 64, {}),
    (small(512, 1408, 6, 8, 8, 8_000, "llama"), "whole", 2, 1, 256, 16, {"adapter.dropout": 0.05}),
    (small(256, 1024, 8, 4, 2, 2_000), "whole", 1, 2, 1024, 16, {}),
    (small(256, 768, 12, 4, 2, 4_000), "whole", 2, 1, 256, 16, {"train.gradient_checkpointing": False}),
    (small(256, 1024, 4, 4, 2, 50_000), "whole", 2, 1, 512, 16, {}),
    (small(128, 512, 4, 4, 2, 150_000), "whole", 1, 1, 512, 16, {}),
    (small(256, 1024, 4, 4, 2, 2_000), "whole", 1, 1, 512, 16, {"adapter.method": "full"}),
    (small(256, 1024, 4, 4, 2, 2_000), "layerwise", 1, 1, 512, 8, {}),
    (small(256, 1024, 4, 4, 2, 2_000), "layerwise", 8, 2, 256, 64, {}),
    (small(512, 1408, 6, 8, 8, 8_000, "llama"), "layerwise", 2, 1, 256, 16, {"adapter.dropout": 0.05}),
    (small(256, 1024, 12, 4, 2, 2_000), "layerwise", 1, 2, 1024, 16, {}),
    (small(256, 1024, 4, 4, 2, 2_000), "layerwise", 16, 2, 256, 16, {}),
    (small(256, 1024, 4, 4, 2, 2_000), "layerwise", 1, 1, 2048, 16, {}),
    (small(768, 2048, 6, 12, 4, 4_000), "layerwise", 4, 1, 128, 32, {}),
    (small(256, 1024, 8, 4, 4, 20_000, "llama"), "layerwise", 4, 2, 512, 16, {"adapter.dropout": 0.05}),
    (small(256, 1024, 4, 4, 2, 50_000), "layerwise", 2, 1, 512, 16, {}),
    (small(128, 512, 4, 4, 2, 150_000), "layerwise", 1, 1, 512, 16, {}),
    (small(256, 1024, 4, 4, 2, 2_000), "layerwise", 1, 1, 256, 16, {"model.quantize_bits": 4}),
    (small(256, 1024, 4, 4, 2, 2_000), "layerwise", 1, 1, 512, 16, {"adapter.method": "full"}),
    (small(256, 1024, 4, 4, 2, 2_000), "layerwise", 1, 1, 512, 16, {"adapter.method": "dora"}),
]
ON_GPU: list[tuple[dict[str, Any], str, int, int, int, int, dict[str, Any]]] = [
    (QWEN_1_5B, backward, at_once, 2, 2048, 32, {"adapter.dropout": 0.05, **bits})
    for backward in ("layerwise", "whole")
    for at_once in (1, 4)
    for bits in ({}, {"model.quantize_bits": 4})
] + [
    (QWEN_1_5B, "layerwise", 16, 2, 512, 32, {}),
    (QWEN_1_5B, "whole", 8, 2, 512, 32, {}),
    (QWEN_1_5B, "whole", 1, 2, 2048, 32, {"train.gradient_checkpointing": False}),
    (QWEN_1_5B, "layerwise", 1, 2, 8192, 32, {}),
]


def profile(folder: Path, case: tuple[dict[str, Any], str, int, int, int, int, dict[str, Any]]) -> Profile:
    base, backward, at_once, parts, length, rank, others = case
    (folder / "config.json").write_text(json.dumps(base))
    table: dict[str, Any] = {
        "kind": "lora",
        "model": {"init_from": str(folder)},
        "adapter": {"rank": rank, "alpha": 2 * rank},
        "data": {"builtin": "python-docs"},
        "train": {
            "steps": 1,
            "batch_size": at_once * parts,
            "micro_batch_size": at_once,
            "sequence_length": length,
            "backward": backward,
        },
    }
    for key, value in others.items():
        section, _, name = key.partition(".")
        table[section][name] = value
    return parse_profile(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["whole", "layerwise"], help="only this way backward")
    options = parser.parse_args()
    print(
        f"{'backward':<11}{'width':>6}{'layers':>7}{'vocabulary':>11}{'at once':>8}{'tokens':>7}{'rank':>5}  ", end=""
    )
    print(f"{'':<34}{'predicted':>11}{'measured':>11}{'ratio':>7}")
    worst = 0.0
    for case in ON_GPU if on_gpu() else ON_CPU:
        base, backward, at_once, _, length, rank, others = case
        if options.only not in (None, backward):
            continue
        with tempfile.TemporaryDirectory() as folder:
            asked = profile(Path(folder), case)
            predicted, measured = plan(asked).predicted_peak_bytes, measure(asked, seconds=0).peak_bytes
        ratio = predicted / measured
        worst = max(worst, abs(ratio - 1))
        shape = f"{base['hidden_size']:>6}{base['num_hidden_layers']:>7}{base['vocab_size']:>11,}"
        said = ", ".join(f"{key.partition('.')[2]} {value}" for key, value in others.items())
        print(f"{backward:<11}{shape}{at_once:>8}{length:>7}{rank:>5}  {said:<34}", end="")
        print(f"{predicted / 1e6:>8,.0f} MB{measured / 1e6:>8,.0f} MB{ratio:>7.2f}", flush=True)
    print(f"furthest off: {100 * worst:.0f} %  (at most 10 %)")


if __name__ == "__main__":
    main()
