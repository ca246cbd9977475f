"""What each measure against memory saves in a step of LoRA: what the plan says, and what it is.

    python tests/benchmarks/lora_savings.py

A base of random weights in Qwen2's shape; every case is measured in a process of its own. Each line is a step with the
measure against one without it, all else being equal.
"""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from engine.planner import plan
from engine.planning.measure import measure
from engine.profile import Profile, parse_profile

BASE = {
    "model_type": "qwen2", "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8,
    "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 32_000, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True, "max_position_embeddings": 4096,
}  # fmt: skip
ALL_LOGITS = "--all-logits"


def profile(folder: str, backward: str, gradient_checkpointing: bool = True, bits: int | None = None) -> Profile:
    shape = {"batch_size": 4, "micro_batch_size": 4, "sequence_length": 512}
    table: dict[str, Any] = {
        "kind": "lora",
        "model": {"init_from": folder, **({"quantize_bits": bits} if bits else {})},
        "adapter": {"rank": 16},
        "data": {"builtin": "python-docs"},
        "train": {"steps": 1, "backward": backward, "gradient_checkpointing": gradient_checkpointing, **shape},
    }
    return parse_profile(table)


def peak_with_all_logits(of: Profile) -> int:
    """The peak of a step that makes all logits at once."""
    done = subprocess.run(
        [sys.executable, __file__, ALL_LOGITS],
        input=json.dumps(of.model_dump(mode="json", by_alias=True)),
        capture_output=True,
        text=True,
        check=True,
    )
    return int(json.loads(done.stdout.strip().splitlines()[-1])["peak_bytes"])


def main() -> None:
    if sys.argv[1:] == [ALL_LOGITS]:
        import engine.ops.losses

        engine.ops.losses.LOGITS_AT_ONCE = 1 << 60
        sys.argv = ["measure", "1"]
        runpy.run_module("engine.planning.measure", run_name="__main__")
        return
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(BASE), encoding="utf-8")
        whole, kept = profile(folder, "whole"), profile(folder, "whole", gradient_checkpointing=False)
        peaks = {"whole": measure(whole).peak_bytes, "kept": measure(kept).peak_bytes}
        layerwise = measure(profile(folder, "layerwise")).peak_bytes
        found = {
            "gradient checkpointing": peaks["kept"] - peaks["whole"],
            "layer by layer": peaks["whole"] - layerwise,
            "loss in chunks": peak_with_all_logits(whole) - peaks["whole"],
            "4 bits": peaks["whole"] - measure(profile(folder, "whole", bits=4)).peak_bytes,
        }
        said = {saving.name: saving.bytes for saving in plan(whole).savings}
    print(f"{'measure':<26}{'the plan says':>16}{'measured':>12}")
    for name, saved in found.items():
        print(f"{name:<26}{said.get(name, 0) / 1e6:13,.0f} MB{saved / 1e6:9,.0f} MB", flush=True)


if __name__ == "__main__":
    main()
