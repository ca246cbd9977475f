"""A few real steps with random tokens, in a process of its own, so that their peak is its own.

It needs no data, no tokenizer and no network. `python -m engine.planning.measure` reads a profile as JSON from standard
input, takes steps of it and answers with one line of JSON.
"""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from engine.errors import UserError
from engine.host.mlx_variables import set_mlx_variables
from engine.planning import micro_batch, micro_batches
from engine.planning.pace import remember
from engine.profile import Profile, parse_profile

_KILLED = (-signal.SIGKILL, -signal.SIGSEGV)
"""How a process ends that asked for too much: by the kernel, or where an address limit refuses it memory."""

_MOST_STEPS = 10


@dataclass(frozen=True)
class Measured:
    """What a real step took; `peak_bytes` is MLX's, `process_peak_bytes` what the process had in memory at most.

    The seconds are a median, of several steps without the first, which also compiles on GPUs.
    """

    peak_bytes: int
    process_peak_bytes: int
    cache_bytes: int
    trained_weight_bytes: int
    optimizer_bytes: int
    gradient_bytes: int
    seconds_a_step: float
    steps: int


def measure(profile: Profile, seconds: float = 3.0) -> Measured:
    """Takes steps of a profile in a fresh process, for about so many seconds, and remembers their time.

    At most two micro-batches of a step are computed: more of them take more time, but no more memory.
    Raises `UserError` in one line where the step fails, also where the system kills it because memory is used up.
    """
    done = subprocess.run(
        [sys.executable, "-P", "-m", "engine.planning.measure", str(seconds)],
        input=json.dumps(profile.model_dump(mode="json", by_alias=True)),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode in _KILLED:
        raise UserError("the measured step was killed by the system: this machine has too little memory for it")
    answer = done.stdout.strip().splitlines()
    if done.returncode or not answer:
        said = done.stderr.strip().splitlines()
        raise UserError(f"the measured step failed: {said[-1] if said else f'exit code {done.returncode}'}")
    measured = Measured(**json.loads(answer[-1]))
    remember(profile, measured.seconds_a_step, steps=measured.steps)
    return measured


def _take_steps(profile: Profile, enough_seconds: float) -> Measured:
    set_mlx_variables(profile.host)
    from engine.backend import compute_dtype, mx, on_gpu
    from engine.optimizer import learning_rate
    from engine.planning.rehearsal import rehearsal
    from engine.ranks import Ranks
    from engine.update import Update

    task = rehearsal(profile)
    update = Update(task, profile.train, Ranks(), compute_dtype(profile.train.dtype), compiled=on_gpu())
    update.restore(task.initial_parameters(), None)
    size, parts = micro_batch(profile), micro_batches(profile)
    seconds: list[float] = []
    gradient_bytes = peak_bytes = 0
    fewest = 2 if on_gpu() else 1
    while len(seconds) < fewest or (sum(seconds) < enough_seconds and len(seconds) < _MOST_STEPS):
        mx.reset_peak_memory()
        started = time.perf_counter()
        for _ in range(min(parts, 2)):
            update.accumulate(task.batch(range(size)))
        accumulated = time.perf_counter()
        gradient = update.collect()
        gradient_bytes = _bytes(gradient.sums)
        update.apply(gradient, learning_rate(profile.train, 1, 1))
        ended = time.perf_counter()
        seconds.append((accumulated - started) * parts / min(parts, 2) + ended - accumulated)
        del gradient
        peak_bytes = max(peak_bytes, mx.get_peak_memory())
    return Measured(
        peak_bytes=peak_bytes,
        process_peak_bytes=_process_peak_bytes(),
        cache_bytes=mx.get_cache_memory(),
        trained_weight_bytes=_bytes(update.parameters),
        optimizer_bytes=_bytes(update.optimizer.state),
        gradient_bytes=gradient_bytes,
        seconds_a_step=median(seconds[1:] or seconds),
        steps=max(1, len(seconds) - 1),
    )


def _bytes(tree: Any) -> int:
    from mlx.utils import tree_flatten

    return sum(array.nbytes for _, array in tree_flatten(tree))


def _process_peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


if __name__ == "__main__":
    measured = _take_steps(parse_profile(json.load(sys.stdin)), float(sys.argv[1]))
    print(json.dumps(asdict(measured)))  # noqa: T201
