"""The machine under a run: files stand in for Linux, programs on PATH for macOS, and this machine for itself."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest
from hypothesis import HealthCheck, given, settings, strategies

from engine.doctor import diagnose
from engine.events import Alarm, Level, Notice, Reading
from engine.finding import Finding
from engine.guards.machine import MachineGuard
from engine.host import awake, this_machine
from engine.host.awake import Awake
from engine.host.findings import host_findings
from engine.host.linux import LinuxMachine
from engine.host.linux_groups import MemoryGroups
from engine.host.macos import MacMachine, sysctl_by_name
from engine.host.nvidia import NvidiaMemory
from engine.host.programs import Programs
from engine.host.watch import Watch
from engine.profile import MemoryGuard

GB = 10**9
linux = pytest.mark.skipif(sys.platform != "linux", reason="about Linux")


def until(happened: Callable[[], object], seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


# --- Linux, as trees of files -----------------------------------------------------------------------------------------


def plant(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")
    return root


def meminfo(total: float, available: float, swap_total: float = 0, swap_free: float = 0) -> str:
    sizes = {"MemTotal": total, "MemFree": 1e6, "MemAvailable": available}
    sizes |= {"SwapTotal": swap_total, "SwapFree": swap_free}
    return "\n".join(f"{name}:{int(size) // 1024:>15} kB" for name, size in sizes.items()) + "\nHugePages_Total:    0"


def stalls(some: float = 0, full: float = 0) -> str:
    rest = "avg60=0.00 avg300=0.00 total=1"
    return f"some avg10={some:.2f} {rest}\nfull avg10={full:.2f} {rest}"


def group_2(limit: str, used: int, inactive: int = 0, active: int = 0, met: int = 0, killed: int = 0) -> dict[str, str]:
    return {
        "memory.max": limit,
        "memory.high": "max",
        "memory.current": str(used),
        "memory.stat": f"anon 1\nfile 2\ninactive_file {inactive}\nactive_file {active}\nslab 7",
        "memory.events": f"low 0\nhigh 0\nmax {met}\noom {killed}\noom_kill {killed}\noom_group_kill 0",
        "memory.swap.current": "4096",
    }


def group_1(limit: int, used: int, inactive: int = 0, met: int = 0, killed: int = 0) -> dict[str, str]:
    return {
        "memory.limit_in_bytes": str(limit),
        "memory.usage_in_bytes": str(used),
        "memory.stat": f"cache 1\ninactive_file 3\ntotal_inactive_file {inactive}\ntotal_swap 8192",
        "memory.failcnt": str(met),
        "memory.oom_control": f"oom_kill_disable 0\nunder_oom 0\noom_kill {killed}",
    }


def under(folder: str, files: dict[str, str]) -> dict[str, str]:
    return {f"{folder}/{name}": text for name, text in files.items()}


VERSION_2 = {"proc/self/cgroup": "0::/jobs/mine"}
VERSION_1 = {"proc/self/cgroup": "5:memory:/docker/1f\n4:cpu,cpuacct:/docker/1f\n0::/"}
PLAIN = {
    "proc/meminfo": meminfo(16 * GB, 12 * GB, swap_total=4 * GB, swap_free=3 * GB),
    "proc/pressure/memory": stalls(some=1.5),
    "proc/self/statm": "5000 1000 900 1 0 700 0",
}
LAPTOP = {
    "sys/class/power_supply/AC/type": "Mains",
    "sys/class/power_supply/AC/online": "1",
    "sys/class/power_supply/BAT0/type": "Battery",
    "sys/class/power_supply/BAT0/status": "Charging",
    "sys/class/power_supply/BAT0/capacity": "85",
    "proc/acpi/button/lid/LID/state": "state:      open",
    "sys/class/thermal/thermal_zone0/temp": "45000",
    "sys/class/thermal/thermal_zone0/trip_point_0_type": "passive",
    "sys/class/thermal/thermal_zone0/trip_point_0_temp": "90000",
    "sys/class/thermal/thermal_zone0/trip_point_1_type": "critical",
    "sys/class/thermal/thermal_zone0/trip_point_1_temp": "105000",
}


class TestLinux:
    def test_a_plain_machine(self, tmp_path: Path) -> None:
        reading = LinuxMachine(plant(tmp_path, PLAIN)).read()
        assert (reading.level, reading.cause) == (Level.GREEN, "")
        assert reading.limit_bytes == pytest.approx(16 * GB, abs=1024)
        assert reading.available_bytes == pytest.approx(12 * GB, abs=1024)
        assert reading.swap_bytes == pytest.approx(1 * GB, abs=2048)
        assert reading.stalled_percent == 1.5
        assert reading.process_bytes == 1000 * os.sysconf("SC_PAGE_SIZE")

    def test_where_nothing_can_be_read_nothing_is_known(self, tmp_path: Path) -> None:
        """The GPU is asked elsewhere than in files."""
        reading = LinuxMachine(tmp_path).read()
        rest = {name: value for name, value in asdict(reading).items() if name != "time" and "gpu" not in name}
        assert rest.pop("cause") == ""
        assert set(rest.values()) == {None}

    @pytest.mark.parametrize(
        ("total", "available", "level"),
        [
            (8 * GB, 0.9 * GB, Level.GREEN),
            (8 * GB, 0.7 * GB, Level.YELLOW),
            (8 * GB, 0.3 * GB, Level.RED),
            (128 * GB, 6 * GB, Level.GREEN),  # filled on purpose, and fine
            (128 * GB, 3 * GB, Level.YELLOW),
            (128 * GB, 1.5 * GB, Level.RED),
        ],
    )
    def test_level_by_the_room_left(self, tmp_path: Path, total: float, available: float, level: Level) -> None:
        reading = LinuxMachine(plant(tmp_path, {"proc/meminfo": meminfo(total, available)})).read()
        assert reading.level == level
        assert ("memory at" in reading.cause) == (level is not Level.GREEN)

    @pytest.mark.parametrize(
        ("available", "some", "full", "level"),
        [
            (2 * GB, 9, 9, Level.GREEN),
            (2 * GB, 15, 5, Level.YELLOW),
            (2 * GB, 40, 30, Level.RED),
            (12 * GB, 40, 30, Level.GREEN),  # somebody else's stalls, or coming back from swap
        ],
    )
    def test_level_by_stalls(self, tmp_path: Path, available: int, some: float, full: float, level: Level) -> None:
        files = {"proc/meminfo": meminfo(16 * GB, available), "proc/pressure/memory": stalls(some, full)}
        reading = LinuxMachine(plant(tmp_path, files)).read()
        assert (reading.level, reading.stalled_percent) == (level, some)
        assert ("waited for memory" in reading.cause) == (level is not Level.GREEN)

    def test_stalls_count_where_the_room_left_is_not_known(self, tmp_path: Path) -> None:
        files = {"proc/pressure/memory": stalls(some=15)}
        assert LinuxMachine(plant(tmp_path, files)).read().level == Level.YELLOW

    def test_stalls_of_its_own_group_count_however_much_the_machine_has(self, tmp_path: Path) -> None:
        own = {"memory.current": "5", "memory.pressure": stalls(some=30, full=20)}
        plant(tmp_path, PLAIN | VERSION_2 | under("sys/fs/cgroup/jobs/mine", own))
        reading = LinuxMachine(tmp_path).read()
        assert (reading.level, reading.stalled_percent) == (Level.RED, 30)
        assert "control group" in reading.cause

    @pytest.mark.parametrize("folder", ["jobs/mine", "jobs"])
    def test_a_limit_of_version_2_counts_also_from_above(self, tmp_path: Path, folder: str) -> None:
        group = group_2(str(GB), used=950_000_000, inactive=10_000_000)
        plant(tmp_path, PLAIN | VERSION_2 | under("sys/fs/cgroup/jobs/mine", group_2("max", 7)))
        plant(tmp_path, under(f"sys/fs/cgroup/{folder}", group))
        reading = LinuxMachine(tmp_path).read()
        assert (reading.limit_bytes, reading.available_bytes) == (GB, 60_000_000)
        assert reading.swap_bytes == 4096
        assert reading.level == Level.YELLOW
        assert reading.cause == "control group at 94 % of 1.0 GB"

    def test_cache_that_can_be_given_back_is_available(self, tmp_path: Path) -> None:
        group = group_2(str(GB), used=990_000_000, inactive=500_000_000, active=200_000_000)
        plant(tmp_path, PLAIN | VERSION_2 | under("sys/fs/cgroup/jobs/mine", group))
        reading = LinuxMachine(tmp_path).read()
        assert (reading.level, reading.available_bytes) == (Level.GREEN, 610_000_000)

    def test_what_slows_a_group_down_is_a_limit_too(self, tmp_path: Path) -> None:
        group = group_2(str(4 * GB), used=900_000_000) | {"memory.high": str(GB)}
        plant(tmp_path, PLAIN | VERSION_2 | under("sys/fs/cgroup/jobs/mine", group))
        assert LinuxMachine(tmp_path).read().limit_bytes == GB

    def test_version_1_in_a_container(self, tmp_path: Path) -> None:
        """The group's path is the host's, and only the mount's root can be seen."""
        group = group_1(2 * GB, used=1_950_000_000, inactive=40_000_000)
        plant(tmp_path, PLAIN | VERSION_1 | under("sys/fs/cgroup/memory", group))
        reading = LinuxMachine(tmp_path).read()
        assert (reading.limit_bytes, reading.available_bytes, reading.swap_bytes) == (2 * GB, 90_000_000, 8192)
        assert reading.level == Level.RED

    def test_version_1_without_a_limit(self, tmp_path: Path) -> None:
        group = group_1(9223372036854771712, used=1_950_000_000)
        plant(tmp_path, PLAIN | VERSION_1 | under("sys/fs/cgroup/memory", group))
        reading = LinuxMachine(tmp_path).read()
        assert reading.limit_bytes == pytest.approx(16 * GB, abs=1024)
        assert reading.level == Level.GREEN

    @pytest.mark.parametrize("version", [1, 2])
    @pytest.mark.parametrize(
        ("used", "cache", "met", "killed", "level", "words"),
        [
            (920_000_000, 0, 3, 0, Level.YELLOW, "at 92 %"),  # as often as before
            (500_000_000, 0, 4, 0, Level.RED, "met its limit"),  # a peak that is over
            (980_000_000, 200_000_000, 4, 0, Level.GREEN, ""),  # files are read
            (500_000_000, 0, 3, 1, Level.RED, "ran out"),
            (980_000_000, 200_000_000, 3, 1, Level.RED, "ran out"),
        ],
    )
    def test_events_of_the_group(
        self, tmp_path: Path, version: int, used: int, cache: int, met: int, killed: int, level: Level, words: str
    ) -> None:
        def group(*state: int) -> dict[str, str]:
            used, cache, met, killed = state
            if version == 1:
                return under("sys/fs/cgroup/memory", group_1(GB, used, inactive=cache, met=met, killed=killed))
            return under("sys/fs/cgroup/jobs/mine", group_2(str(GB), used, inactive=cache, met=met, killed=killed))

        plant(tmp_path, PLAIN | (VERSION_1 if version == 1 else VERSION_2) | group(500_000_000, 0, 3, 0))
        machine = LinuxMachine(tmp_path)
        assert machine.read().level == Level.GREEN, "what happened before it looked is not news"
        plant(tmp_path, group(used, cache, met, killed))
        for _ in range(2):  # an event counts for some seconds
            reading = machine.read()
            assert reading.level == level
            assert words in reading.cause

    def test_events_are_forgotten(self, tmp_path: Path) -> None:
        plant(tmp_path, VERSION_2 | under("sys/fs/cgroup/jobs/mine", group_2(str(GB), 1)))
        groups = MemoryGroups(tmp_path, events_count_seconds=0.05)
        groups.read()
        plant(tmp_path, under("sys/fs/cgroup/jobs/mine", group_2(str(GB), 1, met=1, killed=1)))
        assert [(group.met_limit, group.ran_out) for group in groups.read()] == [(True, True)]
        time.sleep(0.06)
        assert [(group.met_limit, group.ran_out) for group in groups.read()] == [(False, False)]

    def test_a_limit_of_nothing(self, tmp_path: Path) -> None:
        """`echo 0 > memory.high` asks a group to give back what it can."""
        group = group_2("max", 5) | {"memory.high": "0"}
        reading = LinuxMachine(plant(tmp_path, PLAIN | VERSION_2 | under("sys/fs/cgroup/jobs/mine", group))).read()
        assert (reading.level, reading.limit_bytes, reading.available_bytes) == (Level.RED, 0, 0)

    @pytest.mark.parametrize("harm", ["missing", "empty", "words", "bytes", "folder", "unreadable lines"])
    @pytest.mark.parametrize("version", [1, 2])
    def test_a_sign_that_cannot_be_read_takes_no_other_with_it(self, tmp_path: Path, harm: str, version: int) -> None:
        if version == 1:
            groups = VERSION_1 | under("sys/fs/cgroup/memory", group_1(GB, 500_000_000))
        else:
            own = group_2(str(GB), 500_000_000) | {"memory.pressure": stalls()}
            groups = VERSION_2 | under("sys/fs/cgroup/jobs/mine", own)
        files = PLAIN | LAPTOP | groups
        whole = asdict(LinuxMachine(plant(tmp_path / "whole", files)).read())
        assert whole["level"] is Level.GREEN and whole["heat"] == "nominal" and whole["on_mains"] is True
        # What is left without a file: None, or what another file says of the same thing.
        fallbacks = {
            "limit_bytes": {whole["limit_bytes"], 16_000_000_000 // 1024 * 1024},
            "available_bytes": {whole["available_bytes"], 12_000_000_000 // 1024 * 1024},
            "swap_bytes": {whole["swap_bytes"], 4_000_000_000 // 1024 * 1024 - 3_000_000_000 // 1024 * 1024},
            "stalled_percent": {whole["stalled_percent"], 0.0},
            "heat": {"nominal"},
        }
        for name in files:
            root = plant(tmp_path / name.replace("/", "_"), files)
            file = root / name
            file.unlink()
            match harm:
                case "empty":
                    file.touch()
                case "words":
                    file.write_text("no such device\n")
                case "bytes":
                    file.write_bytes(b"\xff\xfe\x00\x80")
                case "folder":
                    file.mkdir()
                case "unreadable lines":
                    file.write_text(files[name].replace("1", "one").replace("0", "zero") + "\n:\n\n 7")
            left = asdict(LinuxMachine(root).read())
            changed = {key for key, value in left.items() if key != "time" and value != whole[key]}
            for key in changed:
                assert left[key] is None or left[key] in fallbacks.get(key, ()), (name, key, left[key])
            assert left["level"] is Level.GREEN
            assert len(changed) <= 4, (name, changed)

    @settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(data=strategies.data())
    def test_whatever_stands_in_the_files_there_is_a_reading(self, tmp_path: Path, data: strategies.DataObject) -> None:
        own = group_2(str(GB), 500_000_000) | {"memory.pressure": stalls()}
        files = PLAIN | LAPTOP | VERSION_2 | under("sys/fs/cgroup/jobs/mine", own)
        plant(tmp_path, files)
        words = strategies.one_of(strategies.integers().map(str), strategies.text(max_size=9), strategies.just("max"))
        for name in data.draw(strategies.lists(strategies.sampled_from(sorted(files)), max_size=3, unique=True)):
            garbled = re.sub(r"[^\s=]+", lambda word: data.draw(words | strategies.just(word[0])), files[name])
            (tmp_path / name).write_bytes(garbled.encode("utf-8", "surrogatepass"))
        machine = LinuxMachine(tmp_path)
        for reading in (machine.read(), machine.read()):
            assert (reading.level is None) or reading.level in Level
            assert reading.battery_percent is None or 0 <= reading.battery_percent <= 100
            assert reading.available_bytes is None or reading.limit_bytes is not None

    @pytest.mark.parametrize(
        ("supplies", "power"),
        [
            ({}, (None, None)),
            ({"AC": {"type": "Mains", "online": "1"}}, (True, None)),
            ({"AC": {"type": "Mains", "online": "0"}}, (False, None)),
            ({"BAT0": {"type": "Battery", "status": "Discharging", "capacity": "40"}}, (False, 40)),
            ({"BAT0": {"type": "Battery", "status": "Full", "capacity": "100"}}, (True, 100)),
            (
                {
                    "AC": {"type": "Mains", "online": "0"},
                    "BAT1": {"type": "Battery", "status": "Discharging", "capacity": "7"},
                    "ucsi": {"type": "USB", "online": "0"},
                },
                (False, 7),
            ),
            ({"ucsi": {"type": "USB", "online": "1"}, "AC": {"type": "Mains", "online": "0"}}, (True, None)),
            (
                {"mouse": {"type": "Battery", "scope": "Device", "status": "Discharging", "capacity": "10"}},
                (None, None),
            ),
            ({"BAT0": {"type": "Battery", "status": "Discharging", "capacity": "-5"}}, (False, None)),
        ],
    )
    def test_power(
        self, tmp_path: Path, supplies: dict[str, dict[str, str]], power: tuple[bool | None, float | None]
    ) -> None:
        for supply, files in supplies.items():
            plant(tmp_path / "sys/class/power_supply" / supply, files)
        reading = LinuxMachine(tmp_path).read()
        assert (reading.on_mains, reading.battery_percent) == power

    @pytest.mark.parametrize(("state", "closed"), [("open", False), ("closed", True), ("unsupported", None)])
    def test_lid(self, tmp_path: Path, state: str, closed: bool | None) -> None:
        plant(tmp_path, {"proc/acpi/button/lid/LID0/state": f"state:      {state}"})
        assert LinuxMachine(tmp_path).read().lid_closed is closed

    @pytest.mark.parametrize(
        ("now", "critical", "heat"),
        [
            (60_000, 100_000, "nominal"),
            (82_000, 100_000, "fair"),
            (91_000, 100_000, "serious"),
            (96_000, 100_000, "critical"),
            (96_000, 0, None),  # firmware that names no temperature
            (-274_000, 100_000, None),
        ],
    )
    def test_heat(self, tmp_path: Path, now: int, critical: int, heat: str | None) -> None:
        zone = {"temp": str(now), "trip_point_0_type": "critical", "trip_point_0_temp": str(critical)}
        plant(tmp_path / "sys/class/thermal/thermal_zone3", zone)
        assert LinuxMachine(tmp_path).read().heat == heat

    def test_heat_without_a_critical_temperature_is_unknown(self, tmp_path: Path) -> None:
        zone = {"temp": "99000", "trip_point_0_type": "passive", "trip_point_0_temp": "90000"}
        plant(tmp_path / "sys/class/thermal/thermal_zone0", zone)
        assert LinuxMachine(tmp_path).read().heat is None


# --- Linux, as it is --------------------------------------------------------------------------------------------------


@linux
def test_this_machine_agrees_with_psutil() -> None:
    reading, memory = this_machine().read(), psutil.virtual_memory()
    assert reading.level is not None
    assert reading.limit_bytes is not None and reading.limit_bytes <= memory.total
    if reading.limit_bytes == memory.total:  # else in a container
        assert reading.available_bytes == pytest.approx(memory.available, rel=0.2)
        assert reading.swap_bytes == pytest.approx(psutil.swap_memory().used, abs=64e6)
    assert reading.process_bytes == pytest.approx(psutil.Process().memory_info().rss, rel=0.05)


MB = 1 << 20
LIMIT = 512 * MB
INSIDE = """
    import json, sys
    from pathlib import Path
    from engine.host.linux import LinuxMachine
    (Path(sys.argv[1]) / "cgroup.procs").write_text("0")
    machine, eaten = LinuxMachine(), []
    def say():
        reading = machine.read()
        print(json.dumps([reading.limit_bytes, reading.available_bytes, reading.level, reading.cause]), flush=True)
    say()
    for line in sys.stdin:
        what, size = line.split()
        if what == "eat":
            eaten.append(b"x" * int(size))
        else:
            with open(what, "wb") as file:
                for _ in range(int(size) >> 20):
                    file.write(bytes(1 << 20))
        say()
"""


@pytest.fixture
def group() -> Iterator[Path]:
    """A memory control group of its own with a limit, of whichever version can be written here."""
    base = Path("/sys/fs/cgroup")
    for parent, limit in ((base, "memory.max"), (base / "memory", "memory.limit_in_bytes")):
        folder = parent / f"retention-tui-test-{os.getpid()}"
        try:
            folder.mkdir()
        except OSError:
            continue
        if (folder / limit).exists():
            (folder / limit).write_text(str(LIMIT))
            yield folder
            until(lambda folder=folder: not (folder / "cgroup.procs").read_text())  # type: ignore[misc]
            folder.rmdir()
            return
        folder.rmdir()
    pytest.skip("no memory control group can be made here: needs root, and the memory controller")


@pytest.fixture
def inside(group: Path) -> Iterator[Callable[[str], tuple[int, int, str, str]]]:
    """Asks a process in that group to `eat BYTES` or write `FILE BYTES`, and what it has read then."""
    command = [sys.executable, "-c", textwrap.dedent(INSIDE), str(group)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as child:
        assert child.stdin is not None and child.stdout is not None
        stdin, stdout = child.stdin, child.stdout

        def ask(line: str) -> tuple[int, int, str, str]:
            if line:
                stdin.write(line + "\n")
            limit, available, level, cause = json.loads(stdout.readline())
            return limit, available, level, cause

        yield ask
        stdin.close()


@linux
def test_a_real_control_group_that_fills_up(inside: Callable[[str], tuple[int, int, str, str]]) -> None:
    """The kernel charges a little more than is asked for: in batches for each core, and in large pages."""
    limit, before, level, _ = inside("")
    assert (limit, level) == (LIMIT, Level.GREEN)
    _, after, level, _ = inside(f"eat {100 * MB}")
    assert before - 125 * MB < after <= before - 100 * MB
    assert level == Level.GREEN
    _, left, level, cause = inside(f"eat {after - 45 * MB}")
    assert 25 * MB < left <= 46 * MB
    assert level == Level.YELLOW
    assert cause.startswith("control group at 9") and "0.5 GB" in cause
    assert inside(f"eat {left - 20 * MB}")[2] == Level.RED


@linux
def test_files_are_no_pressure_in_a_real_control_group(
    group: Path, inside: Callable[[str], tuple[int, int, str, str]], tmp_path: Path
) -> None:
    """A file larger than the limit goes through the cache: the limit is met again and again, and nothing is wrong."""
    version_1 = (group / "memory.failcnt").exists()
    inside("")
    (group / ("memory.limit_in_bytes" if version_1 else "memory.max")).write_text(str(96 * MB))
    limit, available, level, cause = inside(f"{tmp_path / 'large'} {160 * MB}")
    met = (group / ("memory.failcnt" if version_1 else "memory.events")).read_text()
    assert any(int(count) for count in met.split() if count.isdecimal()), "the limit was never met"
    assert limit == 96 * MB
    assert level == Level.GREEN, cause
    assert available > 96 * MB / 3


# --- macOS, by stand-ins ----------------------------------------------------------------------------------------------

SYSCTL = """
    case "$2" in
        kern.memorystatus_vm_pressure_level) echo {pressure} ;;
        vm.swapusage) echo "{swap}" ;;
        *) echo "sysctl: unknown oid '$2'" >&2; exit 1 ;;
    esac
"""
NORMAL = {
    "sysctl": SYSCTL.format(pressure=1, swap="total = 0.00M  used = 0.00M  free = 0.00M  (encrypted)"),
    "pmset": """
        echo "Now drawing from 'AC Power'"
        printf ' -InternalBattery-0 (id=21823587)\t100%%; charged; 0:00 remaining present: true\n'
    """,
    "notifyutil": 'echo "$2 0"',
    "ioreg": """
        echo '+-o IOPMrootDomain  <class IOPMrootDomain, id 0x100000117, registered, matched, active, busy 0 (1 ms)>'
        echo '      "AppleClamshellState" = No'
    """,
}
WARNING = {
    "sysctl": SYSCTL.format(pressure=2, swap="total = 2048.00M  used = 1042.25M  free = 1005.75M  (encrypted)"),
    "pmset": """
        echo "Now drawing from 'Battery Power'"
        printf ' -InternalBattery-0 (id=21823587)\t85%%; discharging; 3:10 remaining present: true\n'
    """,
    "notifyutil": 'echo "$2 2"',
    "ioreg": """echo '      "AppleClamshellState" = Yes'""",
}
CRITICAL = WARNING | {
    "sysctl": SYSCTL.format(pressure=4, swap="total = 8192.00M  used = 6.50G  free = 100.00M  (encrypted)"),
    "notifyutil": 'echo "$2 3"',
}
UNKNOWN = (None, "", None, None, None, None, None)


def stand_in(folder: Path, name: str, script: str) -> Path:
    program = folder / name
    program.parent.mkdir(parents=True, exist_ok=True)
    program.write_text("#!/bin/sh\n" + textwrap.dedent(script).strip("\n") + "\n")
    program.chmod(0o755)
    return program


@pytest.fixture
def bin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH where there is nothing but what is put there."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


def refuse(name: str, size: int) -> bytes:
    raise OSError(2, name)


def mac_signs(reading: Reading) -> tuple[object, ...]:
    return (
        reading.level,
        reading.cause,
        reading.swap_bytes,
        reading.heat,
        reading.on_mains,
        reading.battery_percent,
        reading.lid_closed,
    )


class TestMac:
    @pytest.mark.parametrize(
        ("programs", "signs"),
        [
            (NORMAL, (Level.GREEN, "", 0, "nominal", True, 100, False)),
            (WARNING, (Level.YELLOW, "macOS is short of memory", 1042.25 * 2**20, "serious", False, 85, True)),
            (CRITICAL, (Level.RED, "macOS is out of memory", 6.5 * 2**30, "critical", False, 85, True)),
            ({}, UNKNOWN),
            (dict.fromkeys(NORMAL, "echo '@#!'; echo 7 7 7; head -c 100000 /dev/zero"), UNKNOWN),
            (dict.fromkeys(NORMAL, ""), UNKNOWN),
            (dict.fromkeys(NORMAL, "echo 1; exit 3"), UNKNOWN),
            ({name: f"kill -9 $$; {script}" for name, script in NORMAL.items()}, UNKNOWN),
        ],
        ids=["normal", "warning", "critical", "missing", "garbage", "silent", "failing", "killed"],
    )
    def test_programs_answer(self, bin: Path, programs: dict[str, str], signs: tuple[object, ...]) -> None:
        for name, script in programs.items():
            stand_in(bin, name, script)
        reading = MacMachine(refuse, patient=True).read()
        assert mac_signs(reading) == signs
        assert reading.limit_bytes == psutil.virtual_memory().total

    def test_a_mac_without_battery_and_lid(self, bin: Path) -> None:
        stand_in(bin, "pmset", """echo "Now drawing from 'AC Power'\"""")
        stand_in(bin, "ioreg", "")
        reading = MacMachine(refuse, patient=True).read()
        assert (reading.on_mains, reading.battery_percent, reading.lid_closed) == (True, None, None)

    @pytest.mark.parametrize(("number", "level"), [(1, Level.GREEN), (2, Level.YELLOW), (4, Level.RED), (3, None)])
    def test_the_kernel_is_asked_before_any_program(self, bin: Path, number: int, level: Level | None) -> None:
        def kernel(name: str, size: int) -> bytes:
            values = {
                "kern.memorystatus_vm_pressure_level": struct.pack("<i", number),
                "vm.swapusage": struct.pack("<QQQIi", 3 << 30, 2 << 30, 1 << 30, 16384, 1),
            }
            assert len(values[name]) == size
            return values[name]

        stand_in(bin, "sysctl", 'echo 1; touch "$0.asked"')
        reading = MacMachine(kernel, patient=True).read()
        assert (reading.level, reading.swap_bytes) == (level, 1 << 30)
        assert not (bin / "sysctl.asked").exists()

    @linux
    def test_the_call_fails_cleanly_where_there_is_none(self) -> None:
        with pytest.raises((OSError, AttributeError)):
            sysctl_by_name("kern.memorystatus_vm_pressure_level", 4)

    def test_it_never_waits_and_asks_each_program_once_in_a_while(self, bin: Path) -> None:
        for name, script in NORMAL.items():
            stand_in(bin, name, f'echo "$@" >> {bin}/asked\n' + textwrap.dedent(script))
        stand_in(bin, "notifyutil", f'echo "$@" >> {bin}/asked; exec {sys.executable} -c "import time; time.sleep(60)"')
        machine = MacMachine(refuse)
        readings = []
        for _ in range(100):
            started = time.monotonic()
            readings.append(machine.read())
            assert time.monotonic() - started < 2.0
            time.sleep(0.01)
        assert mac_signs(readings[0]) == UNKNOWN
        asked = (bin / "asked").read_text().splitlines()
        assert len(asked) == len(set(asked)) <= 5


class TestPrograms:
    def test_a_hanging_one_is_killed_and_the_others_are_asked(self, bin: Path) -> None:
        sleep = f'exec {sys.executable} -c "import time; time.sleep(60)"'
        for name in ("bad", "worse"):
            stand_in(bin, name, f"echo $$ > {bin}/{name}.pid; {sleep}")
        stand_in(bin, "good", "echo well")
        programs = Programs(every_seconds=0.2, patience_seconds=0.2)

        def heard(name: str) -> bool:
            try:
                return programs.answer(name) == "well\n"
            except LookupError:
                return False

        def ask_all() -> bool:
            programs.turn()
            return [heard(name) for name in ("bad", "worse", "good")] == [False, False, True]

        assert until(ask_all)
        first = int((bin / "bad.pid").read_text())
        assert until(lambda: ask_all() and int((bin / "bad.pid").read_text()) != first), "it is asked again"
        assert not psutil.pid_exists(first)

    def test_never_two_at_once_and_each_in_its_time(self, bin: Path) -> None:
        mkdir, rmdir, sleep = (shutil.which(name, path="/bin:/usr/bin") for name in ("mkdir", "rmdir", "sleep"))
        script = f"{mkdir} {bin}/busy || echo two >> {bin}/two; {sleep} 0.03; {rmdir} {bin}/busy; echo x >> {bin}/$1"
        stand_in(bin, "ask", script)
        programs = Programs(every_seconds=0.3)
        started = time.monotonic()

        def all_were_asked_twice() -> bool:
            programs.turn()
            for name in ("a", "b", "c"):
                with contextlib.suppress(LookupError):
                    programs.answer("ask", name)
            return all((bin / name).exists() and len((bin / name).read_text()) > 2 for name in ("a", "b", "c"))

        assert until(all_were_asked_twice)
        assert time.monotonic() - started > 0.3
        assert not (bin / "two").exists()

    def test_the_last_answer_is_forgotten_when_it_fails(self, bin: Path) -> None:
        stand_in(bin, "ask", "echo yes")
        programs = Programs(patient=True, every_seconds=0.0)
        assert programs.answer("ask") == "yes\n"
        (bin / "ask").unlink()
        programs.turn()
        with pytest.raises(LookupError):
            programs.answer("ask")


# --- NVIDIA -----------------------------------------------------------------------------------------------------------

NVML = """
    struct memory { unsigned long long total, free, used; };
    static int device;
    int nvmlInit_v2(void) { return 0; }
    int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle) { *handle = &device; return index > 1 ? 2 : 0; }
    int nvmlDeviceGetHandleByUUID(const char *name, void **handle) { *handle = &device; return name[4] == 'a' ? 0 : 2; }
    int nvmlDeviceGetMemoryInfo(void *handle, struct memory *memory) {
        if (handle != &device) return 2;
        memory->total = 150000000000ull; memory->free = 110000000000ull; memory->used = 39000000000ull;
        return 0;
    }
"""


class TestNvidia:
    NONE = "libthere-is-none.so.1"

    @pytest.mark.parametrize(
        ("answer", "memory"), [("104905, 143052", (38147 << 20, 143052 << 20)), ("[N/A], 3", None)]
    )
    def test_nvidia_smi_is_asked_where_there_is_no_library(
        self, bin: Path, answer: str, memory: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
        arguments = "--query-gpu=memory.free,memory.total --format=csv,noheader,nounits --id=1"
        stand_in(bin, "nvidia-smi", f'test "$*" = "{arguments}" && echo "{answer}"')
        gpu = NvidiaMemory(Programs(patient=True), self.NONE)
        if memory is not None:
            assert gpu.read() == memory
        else:
            with pytest.raises(ValueError):
                gpu.read()

    def test_no_gpu(self, bin: Path) -> None:
        with pytest.raises(LookupError):
            NvidiaMemory(Programs(patient=True), self.NONE).read()

    @pytest.mark.parametrize(("visible", "known"), [("", True), ("1", True), ("GPU-abc,0", True), ("5", False)])
    def test_the_library_is_called_as_it_is_declared(
        self, tmp_path: Path, visible: str, known: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        compiler = shutil.which("cc")
        if compiler is None:
            pytest.skip("no C compiler")
        library = tmp_path / "libnvml.so"
        source = textwrap.dedent(NVML)
        subprocess.run([compiler, "-shared", "-fPIC", "-xc", "-", "-o", library], input=source, text=True, check=True)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        monkeypatch.setenv("PATH", str(tmp_path))
        gpu = NvidiaMemory(Programs(patient=True), str(library))
        if known:
            assert gpu.read() == (40 * GB, 150 * GB)
        else:
            with pytest.raises(LookupError):
                gpu.read()

    @pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="no NVIDIA GPU here")
    def test_library_and_program_agree_on_a_real_one(self) -> None:
        by_library = NvidiaMemory(Programs(patient=True)).read()
        by_program = NvidiaMemory(Programs(patient=True), self.NONE).read()
        assert by_library.total_bytes == pytest.approx(by_program.total_bytes, rel=0.03)
        assert by_library.used_bytes == pytest.approx(by_program.used_bytes, abs=1e9)


# --- watching ---------------------------------------------------------------------------------------------------------


class Broken:
    """A machine that cannot be looked at."""

    def read(self) -> Reading:
        raise RuntimeError("no eyes")


class TestWatch:
    def test_it_reads_at_once_and_again_and_again_in_a_thread_of_its_own(self) -> None:
        readings: list[Reading] = []
        threads = set()

        def take(reading: Reading) -> None:
            readings.append(reading)
            threads.add(threading.get_ident())

        started = time.time()
        watch = Watch(take, every_seconds=0.05)
        watch.start()
        assert until(lambda: len(readings) >= 5)
        watch.stop()
        taken = len(readings)
        time.sleep(0.15)
        assert len(readings) == taken
        assert len(threads) == 1 and threading.get_ident() not in threads
        for index, reading in enumerate(readings):
            assert reading.time - started > 0.05 * index - 0.01, "never sooner than it was told"

    def test_a_machine_that_cannot_be_read_is_unknown(self) -> None:
        readings: list[Reading] = []
        watch = Watch(readings.append, Broken(), every_seconds=0.01)
        watch.start()
        assert until(lambda: len(readings) >= 3)
        watch.stop()
        assert {reading.level for reading in readings} == {None}

    def test_it_outlives_a_taker_that_fails(self, capsys: pytest.CaptureFixture[str]) -> None:
        calls = []

        def take(reading: Reading) -> None:
            calls.append(reading)
            raise ValueError("cannot take it")

        watch = Watch(take, Broken(), every_seconds=0.01)
        watch.start()
        assert until(lambda: len(calls) >= 3)
        watch.stop()
        assert "cannot take it" in capsys.readouterr().err

    def test_stopping_is_harmless_at_any_time(self) -> None:
        watch = Watch(lambda reading: watch.stop(), Broken(), every_seconds=0.01)
        watch.stop()
        watch = Watch(lambda reading: watch.stop(), Broken(), every_seconds=0.01)  # from its own thread
        watch.start()
        time.sleep(0.05)
        watch.stop()
        watch.stop()


# --- alarms -----------------------------------------------------------------------------------------------------------


def judged(guard: MachineGuard, *, step: float = 1.0, start: float = 0.0, **series: list[object]) -> list[str]:
    """What the guard says to readings a second apart, as `12: ! text`; `!` is an alarm, `!!` a critical one."""
    said = []
    for index, values in enumerate(zip(*series.values(), strict=True)):
        reading = Reading(time=start + index * step, **dict(zip(series, values, strict=True)))  # type: ignore[arg-type]
        for event in guard.judge(reading):
            mark = ""
            if isinstance(event, Alarm):
                mark = "!! " if event.level == "critical" else "! "
            assert isinstance(event, Alarm | Notice)
            assert event.time == reading.time
            said.append(f"{index}: {mark}{event.text}")
    return said


class TestMachineGuard:
    @pytest.fixture
    def guard(self) -> MachineGuard:
        return MachineGuard(MemoryGuard(swap_mb=500))

    def test_growing_swap_is_an_alarm_once(self, guard: MachineGuard) -> None:
        swap: list[object] = [index * 10_000_000 for index in range(100)]  # over 500 MB from 51 on, doubled at 102
        assert judged(guard, swap_bytes=swap) == ["51: ! swap is at 510 MB and growing"]

    def test_and_again_when_it_has_doubled(self, guard: MachineGuard) -> None:
        swap: list[object] = [index * 10_000_000 for index in range(210)]
        assert [line.split(":")[0] for line in judged(guard, swap_bytes=swap)] == ["51", "102", "204"]

    def test_much_swap_that_does_not_grow_is_none(self, guard: MachineGuard) -> None:
        assert judged(guard, swap_bytes=[4 * GB] * 300) == []

    def test_little_swap_that_grows_is_none(self, guard: MachineGuard) -> None:
        assert judged(guard, swap_bytes=[index * 4_000_000 for index in range(100)]) == []

    def test_slow_growth_over_the_limit_is_none(self, guard: MachineGuard) -> None:
        """A megabyte a minute is what an idle system does."""
        assert judged(guard, swap_bytes=[600_000_000 + index * 16_000 for index in range(1000)]) == []

    def test_swap_that_flutters_about_the_limit_is_said_once(self, guard: MachineGuard) -> None:
        flutter: list[object] = [0, *([480_000_000, 520_000_000] * 100)]
        assert len(judged(guard, swap_bytes=flutter)) == 1

    def test_its_end_is_said_and_it_may_come_again(self, guard: MachineGuard) -> None:
        swap: list[object] = [0, 600_000_000, *([300_000_000] * 90), 700_000_000]
        assert judged(guard, swap_bytes=swap) == [
            "1: ! swap is at 600 MB and growing",
            "2: swap is down to 300 MB",
            "92: ! swap is at 700 MB and growing",
        ]

    def test_never_where_the_profile_says_so(self) -> None:
        guard = MachineGuard(MemoryGuard(swap_mb=0))
        assert judged(guard, swap_bytes=[index * 10_000_000 for index in range(200)]) == []

    def test_battery(self, guard: MachineGuard) -> None:
        mains: list[object] = [True] * 20 + [False] * 100 + [True] * 20
        charge: list[object] = [80] * 20 + [80 - index for index in range(100)] + [5] * 20
        assert judged(guard, on_mains=mains, battery_percent=charge) == [
            "35: ! on battery at 65 %: plug the machine in",
            "100: !! battery at 0 %: the machine will soon switch off",
            "135: on mains power again",
            "135: battery no longer low",
        ]

    def test_a_plug_that_slips_is_no_alarm(self, guard: MachineGuard) -> None:
        assert judged(guard, on_mains=[True, False, False, True] * 50) == []

    def test_what_is_unknown_changes_nothing(self, guard: MachineGuard) -> None:
        lid: list[object] = [None] * 20 + [True] * 20 + [None] * 100 + [True] * 20
        assert judged(guard, lid_closed=lid) == ["35: ! the lid is closed: the machine may sleep"]
        assert judged(guard, start=160, lid_closed=[False] * 20) == ["15: the lid is open"]

    def test_heat(self, guard: MachineGuard) -> None:
        heat: list[object] = ["nominal", "fair"] * 20 + ["serious"] * 20 + ["critical"] * 20 + ["fair"] * 20
        assert judged(guard, heat=heat) == [
            "55: ! the machine is hot and slows down: give it air",
            "75: !! heat is critical: the machine may switch off",
            "95: the machine has cooled",
            "95: heat not critical",
        ]

    def test_heat_at_the_edge_does_not_flap(self, guard: MachineGuard) -> None:
        assert judged(guard, heat=["serious"] * 16 + ["fair", "serious"] * 100) == [
            "15: ! the machine is hot and slows down: give it air"
        ]

    def test_it_says_nothing_of_a_machine_of_which_nothing_is_known(self, guard: MachineGuard) -> None:
        assert judged(guard, swap_bytes=[None] * 50) == []


# --- staying awake ----------------------------------------------------------------------------------------------------

WAIT = f"{sys.executable} -c 'import psutil, sys; psutil.Process(int(sys.argv[1])).wait()'"
CAFFEINATE = f'echo $$ "$@" >> "$0.log"; exec {WAIT} "$3"'
INHIBIT = 'echo $$ "$@" >> "$0.log"; while test "${1#--}" != "$1"; do shift; done; "$@"'
STAY = """
    import os, signal, sys, time
    from engine.host.awake import Awake
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    awake = Awake(platform=sys.argv[1])
    print(awake.start(), flush=True)
    time.sleep(60)
"""


@pytest.fixture
def tools(bin: Path) -> Path:
    """That PATH, with the shell's own programs."""
    for name in ("sh", "cat"):
        (bin / name).symlink_to(shutil.which(name, path="/bin:/usr/bin") or "")
    return bin


def holder(program: Path) -> psutil.Process:
    log = program.parent / f"{program.name}.log"
    assert until(lambda: log.exists() and log.read_text().endswith("\n"))
    return psutil.Process(int(log.read_text().split()[0]))


def gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


class TestAwake:
    def test_caffeinate_is_told_whom_to_wait_for_and_spares_the_display(self, tools: Path) -> None:
        program = stand_in(tools, "caffeinate", CAFFEINATE)
        keeper = Awake(platform="darwin")
        assert keeper.start() == "caffeinate keeps the system awake, wholly so on mains power only"
        assert keeper.held
        process = holder(program)
        assert (tools / "caffeinate.log").read_text().split()[1:] == ["-is", "-w", str(os.getpid())]
        keeper.stop()
        assert gone(process) and not keeper.held
        keeper.stop()

    def test_systemd_inhibit_holds_until_it_is_let_go(self, tools: Path) -> None:
        program = stand_in(tools, "systemd-inhibit", INHIBIT)
        keeper = Awake(platform="linux")
        assert keeper.start() == "systemd-inhibit keeps the system awake; closing the lid still puts it to sleep"
        log = (tools / "systemd-inhibit.log").read_text()
        assert "--what=sleep:idle " in log and "--mode=block" in log
        process = holder(program)
        time.sleep(0.1)
        assert keeper.held and not gone(process)
        keeper.stop()
        assert gone(process)

    @pytest.mark.parametrize(("platform", "name"), [("darwin", "caffeinate"), ("linux", "systemd-inhibit")])
    def test_why_not(self, tools: Path, platform: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(awake, "_SETTLING_SECONDS", 3.0)
        keeper = Awake(platform=platform)
        assert keeper.start() == f"the system may sleep: there is no {name}"
        stand_in(tools, name, "echo 'Failed to connect to bus:' >&2; echo 'No such file' >&2; exit 1")
        assert keeper.start().endswith("Failed to connect to bus: No such file")
        stand_in(tools, name, "exit 7")
        assert keeper.start().endswith("(exit status 7)")
        (tools / name).write_text("no program at all")
        said = keeper.start()
        assert said.startswith("the system may sleep: ") and "\n" not in said
        assert not keeper.held

    def test_systemd_inhibit_that_does_not_answer_is_not_waited_for(
        self, tools: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(awake, "_PATIENCE_SECONDS", 0.5)
        stand_in(tools, "systemd-inhibit", f"echo $$ > $0.log; exec {WAIT} {os.getpid()}")
        assert Awake(platform="linux").start() == "the system may sleep: systemd-inhibit did not answer"
        assert not psutil.pid_exists(int((tools / "systemd-inhibit.log").read_text()))

    @pytest.mark.parametrize(
        ("platform", "name", "script"),
        [("darwin", "caffeinate", CAFFEINATE), ("linux", "systemd-inhibit", INHIBIT)],
    )
    def test_it_survives_ctrl_c_and_ends_with_its_owner_however_that_dies(
        self, tools: Path, platform: str, name: str, script: str
    ) -> None:
        program = stand_in(tools, name, script)
        command = [sys.executable, "-c", textwrap.dedent(STAY), platform]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as owner:
            assert owner.stdout is not None
            assert "keeps the system awake" in owner.stdout.readline()
            process = holder(program)
            os.killpg(owner.pid, signal.SIGINT)
            time.sleep(0.1)
            assert not gone(process)
            owner.kill()
        assert until(lambda: gone(process))

    def test_the_display_is_put_to_sleep_where_it_was_asked_for(self, tools: Path) -> None:
        stand_in(tools, "caffeinate", CAFFEINATE)
        keeper = Awake(display_sleep=True, platform="darwin")
        assert keeper.start().endswith("the display could not be put to sleep")
        stand_in(tools, "pmset", 'echo "$@" > "$0.log"')
        assert keeper.start().endswith("its display sleeps")
        assert (tools / "pmset.log").read_text() == "displaysleepnow\n"
        keeper.stop()


# --- MLX's variables --------------------------------------------------------------------------------------------------


START = "from engine.profile import Host; from engine.host.mlx_variables import set_mlx_variables as set; import os\n"


def set_in_a_process(script: str, **environment: str) -> list[str]:
    surroundings = {
        key: value for key, value in os.environ.items() if not key.startswith(("MLX_MAX", "AGX_", "RETENTION_TUI_SET"))
    }
    done = subprocess.run(
        [sys.executable, "-c", START + textwrap.dedent(script)],
        env=surroundings | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


class TestVariables:
    def test_they_are_set_before_mlx_is_there(self) -> None:
        script = """
            import sys
            print(set(Host()), "MLX_MAX_MB_PER_BUFFER" in os.environ, "AGX_RELAX_CDM_CTXSTORE_TIMEOUT" in os.environ)
            wishes = Host(buffer_mb=64, relax_metal_watchdog=True)
            print(set(wishes), os.environ["MLX_MAX_MB_PER_BUFFER"], os.environ["AGX_RELAX_CDM_CTXSTORE_TIMEOUT"])
            print("mlx.core" in sys.modules)
            import engine.backend
            print(set(wishes))
        """
        assert set_in_a_process(script) == ["[] False False", "[] 64 1", "False", "[]"]

    def test_an_nvidia_gpu_has_smaller_buffers(self, tmp_path: Path) -> None:
        (tmp_path / "driver").touch()
        script = f"""
            from pathlib import Path
            from engine.host.mlx_variables import set_default_buffer
            set_default_buffer(Path({str(tmp_path / "none")!r}))
            print("MLX_MAX_MB_PER_BUFFER" in os.environ)
            set_default_buffer(Path({str(tmp_path / "driver")!r}))
            print(os.environ["MLX_MAX_MB_PER_BUFFER"], set(Host(buffer_mb=16)), os.environ["MLX_MAX_MB_PER_BUFFER"])
            set_default_buffer(Path({str(tmp_path / "driver")!r}))
            print(os.environ["MLX_MAX_MB_PER_BUFFER"])
        """
        assert set_in_a_process(script) == ["False", "64 [] 16", "16"]

    def test_what_the_user_has_set_stays(self) -> None:
        said, value = set_in_a_process(
            "print(*set(Host(buffer_mb=64))); print(os.environ['MLX_MAX_MB_PER_BUFFER'])", MLX_MAX_MB_PER_BUFFER="200"
        )
        assert value == "200"
        assert "stays 200" in said and "asks for 64" in said

    def test_a_process_started_from_a_run_has_wishes_of_its_own(self) -> None:
        child = (
            "print(set(Host(buffer_mb=16)), os.environ['MLX_MAX_MB_PER_BUFFER'], set(Host())); print(dict(os.environ))"
        )
        script = f"""
            import subprocess, sys
            set(Host(buffer_mb=64))
            print(subprocess.run([sys.executable, "-c", {START + child!r}], capture_output=True, text=True).stdout)
        """
        said, surroundings, *_ = set_in_a_process(script)
        assert said == "[] 16 []"
        assert "MLX_MAX_MB_PER_BUFFER'" not in surroundings

    def test_too_late_is_said_and_not_done(self) -> None:
        script = "import engine.backend; print(*set(Host(buffer_mb=64))); print('MLX_MAX_MB_PER_BUFFER' in os.environ)"
        said, done = set_in_a_process(script)
        assert done == "False"
        assert "too late" in said

    def test_a_run_starts_with_them_and_the_next_one_says_that_it_does_not(self, tiny: Path, tmp_path: Path) -> None:
        script = f"""
            from pathlib import Path
            from engine.events import Notice
            from retention_tui.session import Session
            session = Session(Path({str(tmp_path / "runs")!r}))
            for buffer in (48, 64):
                settings = ["train.steps=1", "host.keep_awake=false", f"host.buffer_mb={{buffer}}"]
                client = session.start({str(tiny)!r}, settings)
                print(session.finish(), os.environ["MLX_MAX_MB_PER_BUFFER"])
                print(*(event.text for event in client.events() if isinstance(event, Notice) and "MLX" in event.text))
        """
        first, nothing, second, refusal = set_in_a_process(script)
        assert first == second == "0 48"
        assert nothing == ""
        assert refusal.startswith("MLX_MAX_MB_PER_BUFFER=64 comes too late")


# --- the doctor -------------------------------------------------------------------------------------------------------


class Seen:
    """A machine that looks like a reading."""

    def __init__(self, **signs: object) -> None:
        self._reading = Reading(**signs)  # type: ignore[arg-type]

    def read(self) -> Reading:
        return self._reading


def found(platform: str = "linux", **signs: object) -> dict[str, Finding]:
    return {finding.name: finding for finding in host_findings(Seen(**signs), platform)}


class TestDoctor:
    def test_a_machine_in_order(self, tools: Path) -> None:
        stand_in(tools, "systemd-inhibit", INHIBIT)
        whole = psutil.virtual_memory().total
        signs = {"limit_bytes": whole, "available_bytes": whole // 2, "swap_bytes": 0, "level": Level.GREEN}
        findings = found(**signs, on_mains=True, battery_percent=80, heat="nominal", lid_closed=False)
        assert {finding.status for finding in findings.values()} == {"ok"}
        assert findings["power"].value == "mains, battery at 80 %"
        assert "gpu memory" not in findings

    def test_a_machine_in_trouble(self, tools: Path) -> None:
        signs = {"limit_bytes": GB, "available_bytes": GB // 20, "swap_bytes": 3 * GB, "level": Level.RED, "cause": "x"}
        power = {"on_mains": False, "battery_percent": 30.0, "heat": "serious", "lid_closed": True}
        findings = found("darwin", **signs, **power, gpu_bytes=3 * GB, gpu_limit_bytes=8 * GB)
        troubled = {name for name, finding in findings.items() if finding.status == "warning"}
        assert troubled == {"memory", "memory pressure", "swap", "power", "heat", "lid", "sleep"}
        assert "control group" in findings["memory"].value and "raise the limit" in findings["memory"].advice
        assert "mains power only" in findings["power"].advice
        assert findings["gpu memory"].value == "8.0 GB, 3.0 GB of it in use"

    def test_unknown_is_unknown(self, tools: Path) -> None:
        findings = found()
        for name in ("memory", "memory pressure", "swap", "power", "heat", "lid"):
            assert findings[name].value.startswith("unknown")
        assert "logind" in findings["sleep"].advice

    def test_all_of_it_is_told_beside_the_rest(self, tmp_path: Path) -> None:
        names = {finding.name for finding in diagnose(tmp_path)}
        assert names >= {"memory", "memory pressure", "swap", "power", "heat", "lid", "sleep", "mlx variables", "disk"}

    def test_variables_that_are_set_are_shown(self, tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("MLX_MAX_MB_PER_BUFFER", "64")
        assert found()["mlx variables"].value == "MLX_MAX_MB_PER_BUFFER=64"
