"""The demo from beginning to end: how long it takes, and its held-out bits per byte beside what gzip -9 needs.

    python tests/benchmarks/demo_quality.py [--set KEY=VALUE …]

Runs the same command as a newcomer, in a temporary folder and with an empty cache.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter

from engine.data.python_docs import python_docs
from engine.data.text import gzip_bits_per_byte
from engine.store import RunDirectory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        overrides = [part for override in options.overrides for part in ("--set", override)]
        command = [sys.executable, "-m", "retention_tui", "run", "demo", "--headless", *overrides]
        environment = {**os.environ, "RETENTION_TUI_CACHE": f"{folder}/cache"}
        start = perf_counter()
        subprocess.run(command, cwd=folder, env=environment, stdout=sys.stderr, check=True)
        seconds = perf_counter() - start
        newest = RunDirectory(Path(folder, "runs", "demo")).last("val_bits_per_byte")
    assert newest is not None, "the demo was not validated"
    gzip = gzip_bits_per_byte(python_docs()[1])
    print(f"the demo took {seconds:.0f} s on {os.cpu_count()} cores  (at most 300)")
    print(f"held-out text: {newest[1]:.3f} bits per byte; gzip -9 needs {gzip:.3f}")
    print(f"ratio {newest[1] / gzip:.3f}  (at most 0.85)")


if __name__ == "__main__":
    main()
