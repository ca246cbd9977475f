"""What watchers cost: training speed with three readers on the run's socket, one of them stopped, against none.

    python tests/benchmarks/socket_readers.py [--profile demo] [--steps 20] [--rounds 11]

One process trains the profile in the background, served as every run is. Stretches of equal numbers of steps alternate:
in one nobody listens, in the next three processes watch, one of which has been stopped with SIGSTOP and reads nothing.
By the clock that includes the readers' own work where there is no core for it; the CPU seconds of the training process
are what serving them takes.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import psutil

from engine.commands import Set
from engine.events import Notice
from engine.store import RunDirectory
from retention_tui.background import Background
from retention_tui.remote import RemoteClient
from retention_tui.session import Session

READER = """
import sys, time
from pathlib import Path
from engine.store import RunDirectory
from retention_tui.remote import RemoteClient
client = RemoteClient(RunDirectory(Path(sys.argv[1])))
client.arrived.wait()
print("reads", flush=True)
while client.alive:
    client.events()
    time.sleep(1 / 8)  # as often as a screen looks
"""
WARM_UP_STEPS = 10
FILLING_LINES = 1_500


class Readers:
    """Three processes that watch; the last one is stopped, and what the system keeps for it is full."""

    def __init__(self, run: RunDirectory) -> None:
        command = [sys.executable, "-c", READER, str(run.path)]
        self._processes = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(3)]
        for process in self._processes:
            assert process.stdout is not None and process.stdout.readline() == b"reads\n"
        self._processes[-1].send_signal(signal.SIGSTOP)
        _fill(run)

    def leave(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()


def _fill(run: RunDirectory) -> None:
    """Has the run tell all who watch more than a megabyte: more than a socket takes for one that does not read."""
    client, heard = RemoteClient(run), 0
    for _ in range(FILLING_LINES):
        client.send(Set("nothing.such", "x" * 900))
    while heard < FILLING_LINES:
        heard += sum(isinstance(event, Notice) for event in client.events(1.0))
    client.close()


def step(run: RunDirectory) -> int:
    last = run.last("loss")
    return last[0] if last else 0


def wait_for(run: RunDirectory, wanted: int) -> None:
    while step(run) < wanted:
        time.sleep(0.05)


def measure(background: Background, steps: int) -> tuple[float, float]:
    """Wall and CPU seconds a step, from now on."""
    run, process = background.run, psutil.Process(background.pid)
    first = step(run) + 2
    wait_for(run, first)
    before = process.cpu_times()
    wait_for(run, first + steps)
    after = process.cpu_times()
    done, times = run.curve("time")
    begin, end = times[done >= first][0], times[done >= first + steps][0]
    busy = after.user + after.system - before.user - before.system
    return float(end - begin) / steps, busy / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="demo")
    parser.add_argument("--steps", type=int, default=20, help="steps of a round")
    parser.add_argument("--rounds", type=int, default=11, help="of each kind")
    options = parser.parse_args()
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    asides = ["validate.every=0", "checkpoint.every=0", "checkpoint.every_minutes=0", "train.schedule='constant'"]
    clocks, busies = [], []
    with tempfile.TemporaryDirectory() as folder:
        session = Session(Path(folder))
        background = session.start_in_background(options.profile, [*asides, "train.steps=1000000"])
        run = background.run
        try:
            wait_for(run, WARM_UP_STEPS)
            for number in range(1, options.rounds + 1):
                alone = measure(background, options.steps)
                readers = Readers(run)
                try:
                    watched = measure(background, options.steps)
                finally:
                    readers.leave()
                clocks.append(alone[0] / watched[0])
                busies.append(alone[1] / watched[1])
                print(
                    f"round {number}: alone {1e3 * alone[0]:.1f} ms a step ({1e3 * alone[1]:.1f} of CPU), watched "
                    f"{1e3 * watched[0]:.1f} ms ({1e3 * watched[1]:.1f}), ratio {clocks[-1]:.3f} ({busies[-1]:.3f})",
                    flush=True,
                )
        finally:
            client = RemoteClient(run)
            os.kill(background.pid, signal.SIGTERM)
            while client.alive:
                client.events(1.0)
    print(
        f"training speed with three readers, one of them stopped, median ratio: {median(clocks):.3f}  (at least 0.99)"
    )
    print(f"by CPU seconds of the training process: {median(busies):.3f}  (at least 0.99)")


if __name__ == "__main__":
    main()
