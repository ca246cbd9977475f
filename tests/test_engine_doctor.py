"""The doctor, asked in processes whose surroundings are what it is to find: packages, programs and folders."""

from __future__ import annotations

import ctypes.util
import json
import os
import shutil
import subprocess
import sys
import textwrap
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine import doctor
from engine.backend import BLAS, REFERENCE_BLAS, on_gpu
from engine.cores import quota_cores, ranks_here, ranks_launched, usable_cores

linux_cpu = pytest.mark.skipif(sys.platform != "linux" or on_gpu(), reason="about BLAS on Linux without a GPU")


def diagnose(folder: Path, **environment: str) -> dict[str, dict[str, Any]]:
    """What `retention-tui doctor` finds in a process of its own with these variables."""
    command = [sys.executable, "-m", "retention_tui", "doctor", "--json", "--runs-dir", str(folder / "runs")]
    surroundings = {**os.environ, "RETENTION_TUI_CACHE": str(folder / "cache"), **environment}
    done = subprocess.run(command, cwd=folder, env=surroundings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {finding["name"]: finding for finding in json.loads(done.stdout)}


def rate(finding: dict[str, Any]) -> float:
    return float(finding["value"].split()[0].replace(",", ""))


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """This machine as it is."""
    return diagnose(tmp_path_factory.mktemp("here"))


def test_a_sound_machine_has_no_problem(here: dict[str, dict[str, Any]]) -> None:
    if BLAS == REFERENCE_BLAS:
        pytest.skip("this machine has no fast BLAS")
    assert {name for name, finding in here.items() if finding["status"] == "problem"} == set()
    assert metadata.version("mlx") in here["mlx"]["value"]


@linux_cpu
def test_names_the_blas_that_mlx_multiplies_with(here: dict[str, dict[str, Any]]) -> None:
    assert here["blas"]["value"].startswith(BLAS)
    maps = "open('/proc/self/maps').read()"
    script = f"import engine.backend, pathlib; print(pathlib.Path(engine.backend.BLAS).name in {maps})"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip()
    assert loaded == str(BLAS != REFERENCE_BLAS)


@linux_cpu
def test_sees_the_reference_blas_and_says_what_to_install(tmp_path: Path, here: dict[str, dict[str, Any]]) -> None:
    if ctypes.util.find_library("openblas"):
        pytest.skip("the system's OpenBLAS is found whatever Python packages there are")
    hiding = tmp_path / "hiding" / "scipy_openblas32"
    hiding.mkdir(parents=True)
    hiding.joinpath("__init__.py").touch()
    found = diagnose(tmp_path, PYTHONPATH=str(hiding.parent))
    assert found["blas"]["status"] == found["matmul"]["status"] == "problem"
    assert "scipy-openblas32==0.3.23.293.2" in found["blas"]["advice"]
    assert "libopenblas0-pthread" in found["blas"]["advice"]
    assert rate(here["matmul"]) > 3 * rate(found["matmul"])


@linux_cpu
def test_keeps_the_threads_that_the_user_chose(tmp_path: Path) -> None:
    if BLAS == REFERENCE_BLAS:
        pytest.skip("this machine has no fast BLAS")
    assert diagnose(tmp_path, OPENBLAS_NUM_THREADS="1")["blas"]["value"].endswith(", 1 thread")


@linux_cpu
def test_the_rate_agrees_with_a_clock_of_the_same_work_in_numpy() -> None:
    """NumPy brings an OpenBLAS of its own: two fast ones are within a few times of each other."""
    if BLAS == REFERENCE_BLAS:
        pytest.skip("this machine has no fast BLAS")
    script = """
        import time, numpy as np
        a = np.random.default_rng(0).standard_normal((512, 512), dtype=np.float32)
        times = []
        for _ in range(30):
            started = time.perf_counter(); a @ a; times.append(time.perf_counter() - started)
        print(2 * 512**3 / min(times) / 1e9)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True)
    assert np.log2(doctor.matmul_gflops(512) / float(done.stdout)) == pytest.approx(0, abs=2)


def test_says_that_two_backends_are_installed(tmp_path: Path) -> None:
    if "mlx-cpu" not in doctor.diagnose(tmp_path)[2].value:
        pytest.skip("MLX's CPU backend is not installed here")
    install(tmp_path, "mlx-cuda-13", metadata.version("mlx"))
    mlx = diagnose(tmp_path, PYTHONPATH=str(tmp_path))["mlx"]
    assert mlx["status"] == "problem"
    assert "mlx-cpu and mlx-cuda-13" in mlx["value"]
    assert f"mlx-cuda-13=={metadata.version('mlx')}" in mlx["advice"]


def install(site: Path, package: str, version: str) -> None:
    """Leaves the metadata of an installed package, as pip would."""
    folder = site / f"{package.replace('-', '_')}-{version}.dist-info"
    folder.mkdir()
    folder.joinpath("METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")


class TestNvidia:
    @pytest.fixture
    def path(self, tmp_path: Path) -> str:
        """A PATH with an `nvidia-smi` that answers as one on a machine with a GPU."""
        stand_in = tmp_path / "bin" / "nvidia-smi"
        stand_in.parent.mkdir()
        stand_in.write_text("#!/bin/sh\necho NVIDIA H200\n")
        stand_in.chmod(0o755)
        return f"{stand_in.parent}{os.pathsep}{os.environ['PATH']}"

    @linux_cpu
    def test_advises_the_cuda_backend(self, tmp_path: Path, path: str) -> None:
        gpu = diagnose(tmp_path, PATH=path)["gpu"]
        assert gpu["status"] == "warning"
        assert "NVIDIA H200" in gpu["value"]
        assert "mlx[cuda13]" in gpu["advice"]

    @linux_cpu
    def test_a_cuda_backend_that_finds_no_gpu_is_a_problem(self, tmp_path: Path, path: str) -> None:
        install(tmp_path, "mlx-cuda-13", metadata.version("mlx"))
        assert diagnose(tmp_path, PATH=path, PYTHONPATH=str(tmp_path))["gpu"]["status"] == "problem"

    @pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="there is one")
    def test_no_gpu_is_no_finding(self, here: dict[str, dict[str, Any]]) -> None:
        assert "gpu" not in here


def test_folders_that_cannot_be_written_are_problems(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file where the folder should be")
    found = diagnose(tmp_path, RETENTION_TUI_CACHE=str(tmp_path / "runs" / "cache"))
    for name, way_out in (("runs folder", "--runs-dir"), ("data cache", "RETENTION_TUI_CACHE")):
        assert found[name]["status"] == "problem"
        assert way_out in found[name]["advice"]
    assert (tmp_path / "runs").is_file()


def test_leaves_nothing_behind(tmp_path: Path) -> None:
    diagnose(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_prints_a_line_for_each_finding_and_its_advice(tmp_path: Path) -> None:
    (tmp_path / "runs").touch()
    command = [sys.executable, "-m", "retention_tui", "doctor", "--runs-dir", str(tmp_path / "runs")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    marks = {line.split()[1]: line[0] for line in done.stdout.splitlines() if line[0] in "✓!✗"}
    assert marks["runs"] == "✗" and marks["python"] == "✓"
    assert "→ choose another one with --runs-dir" in done.stdout


class TestCores:
    """Folders as Linux shows them stand in for the kernel's."""

    @staticmethod
    def group(root: Path, membership: str, **limits: str) -> None:
        (root / "proc/self").mkdir(parents=True, exist_ok=True)
        (root / "proc/self/cgroup").write_text(membership + "\n")
        for name, text in limits.items():
            file = root / "sys/fs/cgroup" / name.replace("__", "/").replace("cpu_max", "cpu.max")
            file = file.with_name(file.name.replace("cpu_cfs", "cpu.cfs"))
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text + "\n")

    @pytest.mark.parametrize(
        ("limits", "cores"),
        [
            ({}, None),
            ({"cpu_max": "max 100000"}, None),
            ({"cpu_max": "150000 100000"}, 2),
            ({"cpu_max": "20000 100000"}, 1),
            ({"jobs__mine__cpu_max": "400000 100000", "jobs__cpu_max": "300000 100000"}, 3),
            ({"jobs__mine__cpu_max": "max 100000", "jobs__cpu_max": "100000 50000"}, 2),
        ],
    )
    def test_quota_of_version_2(self, tmp_path: Path, limits: dict[str, str], cores: int | None) -> None:
        self.group(tmp_path, "0::/jobs/mine", **limits)
        assert quota_cores(tmp_path) == cores

    @pytest.mark.parametrize(("quota", "cores"), [("-1", None), ("250000", 3)])
    def test_quota_of_version_1(self, tmp_path: Path, quota: str, cores: int | None) -> None:
        """In a container the group's path is the host's, and only the mount's root can be seen."""
        folder = "cpu,cpuacct__"
        limits = {f"{folder}cpu_cfs_quota_us": quota, f"{folder}cpu_cfs_period_us": "100000"}
        self.group(tmp_path, "5:memory:/docker/1f\n4:cpu,cpuacct:/docker/1f\n0::/", **limits)
        assert quota_cores(tmp_path) == cores

    def test_no_groups_at_all(self, tmp_path: Path) -> None:
        assert quota_cores(tmp_path) is None

    def test_ranks_on_one_machine_share_its_cores(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        alone = usable_cores()
        hosts = tmp_path / "hosts.json"
        monkeypatch.setenv("MLX_HOSTFILE", str(hosts))
        hosts.write_text(json.dumps([[f"10.0.0.{host}:{5000 + i}"] for i, host in enumerate([1, 1, 2])]))
        for rank, here in (("0", 2), ("1", 2), ("2", 1)):
            monkeypatch.setenv("MLX_RANK", rank)
            assert (ranks_here(), ranks_launched()) == (here, 3)
            assert usable_cores() == max(1, alone // here)
        hosts.write_text("")  # as mlx.launch leaves it for a single process
        monkeypatch.setenv("MLX_RANK", "0")
        assert (ranks_here(), ranks_launched(), usable_cores()) == (1, 1, alone)
