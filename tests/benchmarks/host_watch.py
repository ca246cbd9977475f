"""What watching the machine costs: the CPU time of its thread, as a share of a core.

    python tests/benchmarks/host_watch.py [--seconds 20]

This machine is watched once a second, as a run does it; then a Mac is, by stand-ins for the programs that a Mac is
asked with (sysctl by its fallback, so that the worst case is counted). The share has the thread itself, with starting
programs, and beside it the programs; those are shell scripts here, so of theirs only the order of magnitude counts.
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
import threading
import time
from itertools import pairwise
from pathlib import Path
from statistics import median

from engine.events import Reading
from engine.host import Machine, this_machine
from engine.host.macos import MacMachine
from engine.host.watch import Watch

ANSWERS = {
    "sysctl": 'test "$2" = vm.swapusage && echo "total = 2.00M  used = 1.00M  free = 1.00M" || echo 1',
    "pmset": "echo \"Now drawing from 'AC Power'\"",
    "notifyutil": 'echo "$2 0"',
    "ioreg": """echo '"AppleClamshellState" = No'""",
}


def cost(machine: Machine, seconds: float) -> tuple[float, float, list[float]]:
    """CPU seconds of the thread and of its programs over so long, and of each reading."""
    spent: list[float] = []
    enough = threading.Event()

    def take(reading: Reading) -> None:
        spent.append(time.thread_time())
        if len(spent) > seconds:
            enough.set()

    before = _programs_seconds()
    watch = Watch(take, machine)
    watch.start()
    enough.wait()
    watch.stop()
    readings = [after - before for before, after in pairwise(spent)]
    return spent[-1] - spent[0], _programs_seconds() - before, readings


def _programs_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def report(name: str, machine: Machine, seconds: float) -> None:
    thread, programs, readings = cost(machine, seconds)
    print(
        f"{name:<14} thread {100 * thread / seconds:.2f} % of a core, programs {100 * programs / seconds:.2f} %; "
        f"a reading {1e3 * median(readings):.2f} ms, the longest {1e3 * max(readings):.2f} ms"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=20)
    options = parser.parse_args()
    report("this machine", this_machine(), options.seconds)
    with tempfile.TemporaryDirectory() as folder:
        for name, script in ANSWERS.items():
            program = Path(folder) / name
            program.write_text(f"#!/bin/sh\n{script}\n")
            program.chmod(0o755)
        os.environ["PATH"] = folder
        report("a Mac", MacMachine(_no_sysctl), options.seconds)


def _no_sysctl(name: str, size: int) -> bytes:
    raise OSError(2, name)


if __name__ == "__main__":
    main()
