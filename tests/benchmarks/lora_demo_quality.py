"""The fine-tuning demo from beginning to end: how long it takes, and how many held-out questions it answers in style.

    python tests/benchmarks/lora_demo_quality.py [--questions N] [--set KEY=VALUE …]

Runs the same command as a newcomer, in a temporary folder and with an empty cache. The answers are mlx-lm's, greedy,
with the folder of the best checkpoint as the adapter.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter

import engine.backend  # noqa: F401  (the fast BLAS must be loaded before anything imports MLX)
from engine.checkpoint import choose_checkpoint
from engine.data.chat_dataset import load_chat_data
from engine.data.python_questions import CLOSING, OPENING
from engine.loading import Loading
from engine.models.demo_llama import demo_llama
from engine.profile import LoRAProfile
from engine.profile_files import load_profile
from engine.store import RunDirectory

from mlx_lm import generate, load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=50)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["RETENTION_TUI_CACHE"] = f"{folder}/cache"
        overrides = [part for override in options.overrides for part in ("--set", override)]
        command = [sys.executable, "-m", "retention_tui", "run", "lora-demo", "--headless", *overrides]
        start = perf_counter()
        base = demo_llama(Loading())
        after_base = perf_counter()
        subprocess.run(command, cwd=folder, stdout=sys.stderr, check=True)
        finished = perf_counter()
        adapter = choose_checkpoint(RunDirectory(Path(folder, "runs", "lora-demo")), "best", to_read=True).path
        profile = load_profile("lora-demo", options.overrides)
        assert isinstance(profile, LoRAProfile)
        with_adapter, without = (list(answers(profile, base, folder, options.questions)) for folder in (adapter, None))
    print(f"pretraining the base took {after_base - start:.0f} s on {os.cpu_count()} cores")
    print(f"the run took {finished - after_base:.0f} s")
    print(f"in style, of {options.questions} held-out questions: {share(with_adapter):.2f}  (at least 0.95)")
    print(f"in style without the adapter: {share(without):.2f}  (0)")
    print(f"distinct answers: {len(set(with_adapter))}")
    for text in with_adapter[:8]:
        print(f"    {text}")


def answers(profile: LoRAProfile, base: Path, adapter: Path | None, questions: int) -> Iterator[str]:
    """Greedy answers to the first held-out questions."""
    model, tokenizer = load(str(base), adapter_path=adapter and str(adapter))
    rows = load_chat_data(profile.data, tokenizer, profile.train.sequence_length, profile.seed, Loading()).heldout
    for index in range(questions):
        tokens, counted, _ = rows.batch([index])
        asked = int(counted[0].argmax()) + 1  # the first token that is learned is the answer's
        yield generate(model, tokenizer, tokens[0][:asked].tolist(), max_tokens=80)


def share(texts: list[str]) -> float:
    return sum(text.startswith(OPENING) and text.endswith(CLOSING) for text in texts) / len(texts)


if __name__ == "__main__":
    main()
