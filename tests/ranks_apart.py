"""One rank of several, for test_engine_ranks.py: trains with `Ranks` and `Update`, and leaves its own weights behind.

ranks_apart.py PROFILE STEPS FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

from engine.backend import mx
from engine.profile_files import load_profile
from engine.ranks import Ranks
from engine.tasks import make_task
from engine.update import Update

from mlx.utils import tree_flatten, tree_map


def main(profile_path: str, steps: str, folder: str) -> None:
    ranks, profile = Ranks(), load_profile(profile_path)
    task = make_task(profile, Path(folder))
    update = Update(task, profile.train, ranks, mx.float32, compiled=False)
    # Each begins elsewhere, so that what they end with in common is what they agreed on.
    update.restore(tree_map(lambda array: array + ranks.rank, task.initial_parameters()), None)
    update.agree()
    for step in range(1, int(steps) + 1):
        for example in task.examples(step, ranks.rank, ranks.size):
            update.accumulate(task.batch([example]))
        update.apply(update.collect(), 1e-2)
    weights = {f"weights.{name}": array for name, array in tree_flatten(update.parameters)}
    mx.save_safetensors(f"{folder}/rank-{ranks.rank}.safetensors", {**weights, **update.optimizer_state()})
    mx.clear_streams()


if __name__ == "__main__":
    main(*sys.argv[1:])
