"""What the screen costs: training speed under the app against the same steps in a bare loop, and how late its loop is.

    python tests/benchmarks/app_overhead.py [--steps 60] [--rounds 5]

Each round trains the same steps of the demo in two processes, one after the other: in a loop of nothing but steps, and
by the engine under the app (130×40, charts shown). Both have one BLAS thread, so that on two cores there is one for
each. In the app a 10 ms ticker runs on its event loop; its lateness is what a key press would wait.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter

WARM_UP_STEPS = 5
TICK_SECONDS = 0.01


def settings(steps: int) -> list[str]:
    """The demo without validations and checkpoints, which a bare loop does not have."""
    asides = ("validate.every=0", "validate.batches=1", "checkpoint.every=0", "checkpoint.every_minutes=0")
    return [f"train.steps={steps + WARM_UP_STEPS}", *asides]


def train_bare(steps: int) -> dict[str, float]:
    from engine.backend import compute_dtype, on_gpu
    from engine.optimizer import learning_rate
    from engine.profile_files import load_profile
    from engine.ranks import Ranks
    from engine.tasks import make_task
    from engine.update import Update

    profile = load_profile("demo", settings(steps))
    task = make_task(profile, Path("runs"))
    update = Update(task, profile.train, Ranks(), compute_dtype(profile.train.dtype), compiled=on_gpu())
    update.restore(task.initial_parameters(), None)
    start = 0.0
    for step in range(1, steps + WARM_UP_STEPS + 1):
        update.accumulate(task.batch(task.examples(step, rank=0, ranks=1)))
        update.apply(update.collect(), learning_rate(profile.train, step, task.total_steps()))
        if step == WARM_UP_STEPS:
            start = perf_counter()
    return {"seconds_a_step": (perf_counter() - start) / steps}


def train_under_the_app(steps: int) -> dict[str, float]:
    from retention_tui.app import RetentionApp
    from retention_tui.session import Session

    with tempfile.TemporaryDirectory() as folder:
        session = Session(Path(folder))
        client = session.start("demo", settings(steps))
        late: list[float] = []

        async def tick() -> None:
            while True:
                due = perf_counter() + TICK_SECONDS
                await asyncio.sleep(TICK_SECONDS)
                late.append(perf_counter() - due)

        async def watch() -> None:
            async with RetentionApp(session, client).run_test(size=(130, 40)):
                while (client.run.last("loss") or (0, 0.0))[0] < WARM_UP_STEPS:
                    await asyncio.sleep(0.05)
                ticker = asyncio.create_task(tick())
                while client.alive:
                    await asyncio.sleep(0.5)
                ticker.cancel()

        asyncio.run(watch())
        if code := session.finish():
            raise SystemExit(code)
        times = client.run.curve("time")[1]
    late.sort()
    return {
        "seconds_a_step": float(times[-1] - times[WARM_UP_STEPS - 1]) / steps,
        "late_p50_ms": 1e3 * late[len(late) // 2],
        "late_p99_ms": 1e3 * late[int(len(late) * 0.99)],
        "late_worst_ms": 1e3 * late[-1],
    }


def measure(kind: str, steps: int) -> dict[str, float]:
    """One process's figures."""
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--steps", str(steps), "--only", kind]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr or done.stdout)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="measured steps of each process")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=["bare", "app"], help="train in this process and print its figures as JSON")
    options = parser.parse_args()
    if options.only:
        train = train_bare if options.only == "bare" else train_under_the_app
        print(json.dumps(train(options.steps)))
        return

    ratios, worst = [], []
    for number in range(1, options.rounds + 1):
        bare, app = measure("bare", options.steps), measure("app", options.steps)
        ratios.append(bare["seconds_a_step"] / app["seconds_a_step"])
        worst.append(app["late_p99_ms"])
        print(
            f"round {number}: bare {1e3 * bare['seconds_a_step']:.1f} ms a step, under the app "
            f"{1e3 * app['seconds_a_step']:.1f} ms, ratio {ratios[-1]:.3f}; ticker late "
            f"p50 {app['late_p50_ms']:.1f} ms, p99 {app['late_p99_ms']:.1f} ms, worst {app['late_worst_ms']:.0f} ms",
            flush=True,
        )
    print(f"speed under the app, median ratio: {median(ratios):.3f}  (at least 0.97)")
    print(f"10 ms ticker, median p99: {median(worst):.1f} ms late  (under 50)")


if __name__ == "__main__":
    main()
