"""What this machine has, what it lacks, and how fast it multiplies."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

from engine.backend import BLAS, REFERENCE_BLAS, device_words, mx, on_gpu
from engine.config import config_path, load_config
from engine.cores import usable_cores
from engine.data.text_dataset import cache_folder
from engine.errors import UserError
from engine.finding import Finding
from engine.host.findings import host_findings

_FAST_BLAS = "pip install scipy-openblas32==0.3.23.293.2, or on Debian and Ubuntu: apt install libopenblas0-pthread"
_CPU_BACKEND = "mlx-cpu"
_CUDA_BACKENDS = ("mlx-cuda-13", "mlx-cuda-12")
_SLOW_GFLOPS_A_THREAD = 15  # the reference BLAS does 6 in all, OpenBLAS 50 and more a core
_THREADS_COUNTED = 4  # the product is too small to keep many more of them busy
_LITTLE_DISK_BYTES = 2e9


def diagnose(runs_folder: Path) -> list[Finding]:
    """Looks the machine over, for training into `runs_folder`; takes about a second, and leaves nothing behind."""
    return [
        Finding("python", f"{platform.python_version()} in {sys.prefix}"),
        Finding("platform", platform.platform()),
        _mlx(),
        *_gpu(),
        _blas(),
        _matmul(),
        *host_findings(),
        _disk(runs_folder),
        _writable("runs folder", runs_folder, "choose another one with --runs-dir or $RETENTION_TUI_RUNS"),
        _writable("data cache", cache_folder(), "choose another one with $RETENTION_TUI_CACHE"),
        _config(),
        _terminal(),
        Finding("screen", ", ".join(f"{name} {_version(name) or 'missing'}" for name in ("textual", "plotext"))),
    ]


def matmul_gflops(size: int, seconds: float = 0.4) -> float:
    """The best rate of fp32 products of two `size` × `size` matrices, in GFLOP/s (2·size³ operations each).

    The best one, because whatever else runs on the machine can only make it slower.
    """
    left, right = mx.random.normal((size, size)), mx.random.normal((size, size))
    mx.eval(left, right, left @ right)
    fastest = float("inf")
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        started = time.perf_counter()
        mx.eval(left @ right)
        fastest = min(fastest, time.perf_counter() - started)
    return 2 * size**3 / fastest / 1e9


def _mlx() -> Finding:
    cuda = [name for name in _CUDA_BACKENDS if _version(name)]
    backends = [name for name in (_CPU_BACKEND, *_CUDA_BACKENDS, "mlx-metal") if _version(name)]
    value = f"{_version('mlx')} on {device_words()}, backend {' and '.join(backends) or 'unknown'}"
    if cuda and _version(_CPU_BACKEND):
        advice = (
            "both backends bring the same library, and the one installed last is in force; "
            f"keep one: pip uninstall -y {_CPU_BACKEND} && "
            f"pip install --force-reinstall --no-deps {cuda[0]}=={_version(cuda[0])}"
        )
        return Finding("mlx", value, "problem", advice)
    return Finding("mlx", value)


def _gpu() -> list[Finding]:
    """The NVIDIA GPU, if the machine has one."""
    if not (name := _nvidia_gpu()):
        return []
    if on_gpu():
        return [Finding("gpu", name)]
    if any(_version(backend) for backend in _CUDA_BACKENDS):
        return [Finding("gpu", f"{name}, which MLX does not use", "problem", "see what its driver says: nvidia-smi")]
    advice = f"pip uninstall -y {_CPU_BACKEND} && pip install 'mlx[cuda13]=={_version('mlx')}'"
    return [Finding("gpu", f"{name}, which MLX's CPU backend does not use", "warning", advice)]


def _nvidia_gpu() -> str:
    command = shutil.which("nvidia-smi")
    if command is None:
        return ""
    try:
        query = [command, "--query-gpu=name", "--format=csv,noheader"]
        answer = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return ", ".join(answer.stdout.split("\n")).strip(", ")


def _blas() -> Finding:
    if BLAS == REFERENCE_BLAS and not on_gpu():
        return Finding("blas", "the reference one that MLX's CPU wheel brings, which is slow", "problem", _FAST_BLAS)
    return Finding("blas", f"{BLAS}, {_thread_words()}" if sys.platform == "linux" else BLAS)


def _matmul() -> Finding:
    rate = matmul_gflops(4096 if on_gpu() else 512)
    value = f"{rate:,.0f} GFLOP/s in fp32"
    if on_gpu() or rate >= _SLOW_GFLOPS_A_THREAD * min(_threads(), _THREADS_COUNTED):
        return Finding("matmul", value)
    if BLAS == REFERENCE_BLAS:
        return Finding("matmul", f"{value}; a fast BLAS does ten times as much", "problem")
    return Finding(
        "matmul", f"{value}: slow for {_threads()} threads", "warning", "is the machine busy with other work?"
    )


def _threads() -> int:
    """The BLAS's threads; `engine.backend` sets the variable where the user has not."""
    asked = os.environ.get("OPENBLAS_NUM_THREADS", "")
    cores = usable_cores()
    return min(int(asked), cores) if asked.isdecimal() and int(asked) else cores


def _thread_words() -> str:
    return "1 thread" if _threads() == 1 else f"{_threads()} threads"


def _disk(runs_folder: Path) -> Finding:
    folder = _nearest_folder(runs_folder)
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return Finding("disk", f"{folder}: {error.strerror}", "problem", "choose another one with --runs-dir")
    value = f"{_gigabytes(free)} free for runs"
    if free < _LITTLE_DISK_BYTES:
        return Finding("disk", value, "warning", "checkpoints need room: make some, or choose another --runs-dir")
    return Finding("disk", value)


def _writable(name: str, folder: Path, advice: str) -> Finding:
    """Tries to write where the folder is, or would be made."""
    try:
        with tempfile.TemporaryFile(dir=_nearest_folder(folder)):
            return Finding(name, f"{folder.absolute()} can be written")
    except OSError as error:
        return Finding(name, f"{folder.absolute()} cannot be written: {error.strerror}", "problem", advice)


def _nearest_folder(path: Path) -> Path:
    """The path itself, or the first of its parents that exists."""
    return next((folder for folder in (path, *path.absolute().parents) if folder.exists()), path)


def _config() -> Finding:
    try:
        hooks = load_config().hooks.commands()
    except UserError as error:
        return Finding("config", str(error), "problem", "mend it: no run starts with it")
    if hooks:
        return Finding("config", f"{config_path()}, with hooks on {', '.join(hooks)}")
    return Finding("config", f"{config_path()} {'has no hooks' if config_path().exists() else 'would be its place'}")


def _terminal() -> Finding:
    if not sys.stdout.isatty():
        return Finding("terminal", "none: runs print lines instead of the screen")
    columns, lines = shutil.get_terminal_size()
    kind = os.environ.get("TERM", "")
    colours = "16 million colours" if os.environ.get("COLORTERM") in ("truecolor", "24bit") else "256 colours or fewer"
    value = f"{columns}×{lines}, {kind or 'TERM is not set'}, {colours}"
    if kind in ("", "dumb"):
        return Finding("terminal", value, "problem", "the screen needs a terminal that can place text: set TERM")
    if sys.stdout.encoding.lower() != "utf-8":
        return Finding("terminal", f"{value}, {sys.stdout.encoding}", "warning", "the charts need UTF-8: set LANG")
    return Finding("terminal", value)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:,.1f} GB"
