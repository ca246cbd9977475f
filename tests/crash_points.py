"""Vanishes at every moment of a run's bookkeeping in turn, for test_engine_crash_points.py.

crash_points.py FOLDER FIRST STRIDE

The bookkeeping of two attempts is done by a fork of this process, which vanishes at moment FIRST, in FOLDER/FIRST; then
by one that vanishes STRIDE moments later, and so on until one reaches the end. `crashed` is what each left,
`recovered` the same after another process has gone on with it, and `said` the steps that it had reported as saved.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from fault_injection import Faults, Plan

from engine.backend import mx
from engine.checkpoint import Checkpoint, list_checkpoints, newest_attempt, prune_checkpoints, save_checkpoint
from engine.events import State
from engine.runs import RunLock, create_run, find_run
from engine.store import RunDirectory
from engine.store_writer import StoreWriter

mx.set_default_device(mx.cpu)  # what a GPU holds does not survive a fork
KEEP, EVERY = 1, 2
UNTIL = (4, 6, 8)
"""The last step of the first, the second and the recovering attempt."""
SCORES = {2: 1.0, 4: 2.0, 6: 3.0, 8: 4.0}
"""Held-out loss by step: the best is the first."""


def attempt(run: RunDirectory, until: int, said: Path | None = None) -> None:
    """What a trainer does to the disk, from the newest checkpoint on."""
    lock = RunLock(run)
    store = StoreWriter(run)
    checkpoints = list_checkpoints(run)
    step = checkpoints[-1].step if checkpoints else 0
    if step in SCORES:  # as a trainer makes up for a validation
        checkpoints[-1].note(val_loss=SCORES[step])
    run.update_identity(data_digest="text")
    store.begin_attempt(step, until, newest_attempt(run))
    store.set_state(State.TRAINING)
    while step < until:
        step += 1
        store.record(step, {"loss": 1 / step})
        store.flush()
        if step % EVERY == 0:
            checkpoint = save(run, store, step)
            prune_checkpoints(run, KEEP)
            if said is not None:
                with said.open("a") as file:
                    file.write(f"{step}\n")
            if step in SCORES:
                checkpoint.note(val_loss=SCORES[step])
    save(run, store, step)  # again, as after a sync that failed
    store.set_state(State.FINISHED)
    store.close()
    lock.release()


def save(run: RunDirectory, store: StoreWriter, step: int) -> Checkpoint:
    def write_model(folder: Path) -> None:
        mx.save_safetensors(str(folder / "model.safetensors"), {"weight": mx.full((4,), float(step))})

    store.settle()
    moments = {"moment": mx.full((4,), float(step))}
    return save_checkpoint(run, step, store.attempt, write_model, moments, {"val_loss": None})


def in_a_fork(work: object) -> int:
    """The exit code of a fork that does `work()`. MLX has not computed in this process: only so it can be forked."""
    if (child := os.fork()) == 0:
        try:
            work()  # type: ignore[operator]
        except BaseException as error:
            os.write(2, f"{error!r}\n".encode())
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(folder: Path, moment: int, stride: int) -> None:
    code = 137
    while code == 137:
        runs = folder / str(moment)
        said = runs / "said"
        runs.mkdir()

        def work(runs: Path = runs, said: Path = said, moment: int = moment) -> None:
            Faults(Plan("exit", 0, moment, moment), runs / "crashed")
            run = create_run(runs / "crashed", "run", {"profile": {"kind": "retention-lm"}})
            attempt(run, UNTIL[0], said)
            attempt(run, UNTIL[1], said)

        code = in_a_fork(work)
        if code == 1:
            raise SystemExit(1)

        def recover(runs: Path = runs) -> None:
            if (runs / "crashed").exists():
                shutil.copytree(runs / "crashed", runs / "recovered")
            folder = runs / "recovered"
            begun = (folder / "run" / "run.json").exists()
            attempt(find_run(folder, "run") if begun else create_run(folder, "run", {}, name="run"), UNTIL[2])

        if in_a_fork(recover):
            raise SystemExit(f"not recovered after moment {moment}")
        moment += stride


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
