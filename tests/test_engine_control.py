"""The run's socket: who may open it, what it takes and refuses, what a watcher hears; training feels none of it."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import stat
import string
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine import events
from engine.commands import Command, Generate, Pause, Resume, Set, Stop
from engine.control import WATCHERS, ControlServer
from engine.control_socket import Connection, peer_uid, read_address
from engine.errors import ExitCode
from engine.events import (
    AnswerEnded,
    AnswerStarted,
    Event,
    Notice,
    RunEnded,
    RunOpened,
    StateChanged,
    StepCompleted,
    to_json,
)
from engine.profile import Profile
from engine.profile_files import load_profile
from engine.runs import create_run
from engine.store import RunDirectory
from engine.watchers import Watcher
from engine.wire import (
    LONGEST_COMMAND_BYTES,
    Lines,
    WireError,
    command_to_json,
    event_to_line,
    parse,
    read_command,
    read_event,
)
from engine.worker import Engine, Mailbox

ENDLESS = ["train.steps=1000000", "validate.every=0", "checkpoint.every=0", "train.batch_size=4"]
EVENTS = [kind for kind in vars(events).values() if isinstance(kind, type) and issubclass(kind, Event)][1:]
WORDS = st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), max_size=20)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=10,
)


class Served:
    """A run in this process, with its engine and its server."""

    def __init__(self, folder: Path, profile: Profile, name: str = "tiny") -> None:
        identity = {"profile": profile.model_dump(mode="json", by_alias=True), "environment": {}}
        self.run = create_run(folder, "tiny", identity, name)
        self.engine = Engine(self.run, profile)
        self.mailbox = self.engine.subscribe()
        self.peers: list[Raw] = []
        self.said = self.engine.subscribe()
        self.server = ControlServer(self.run, self.said, self.engine.send)

    def start(self) -> Served:
        self.server.start()
        self.engine.start()
        return self

    def end(self) -> None:
        self.engine.send(Stop(checkpoint=False))
        self.engine.join()
        self.server.close()

    def connect(self, looks_only: bool = False) -> Connection:
        address = read_address(self.run)
        assert address is not None
        return Connection(address, looks_only)

    def raw(self, hello: bytes = b'{"hello": 1}\n') -> Raw:
        address = read_address(self.run)
        assert address is not None
        self.peers.append(Raw(address.path, hello))
        return self.peers[-1]

    def show_out(self) -> None:
        """Closes what tests have opened; the server, which notices in its next round, has room again afterwards."""
        many = len(self.peers) >= WATCHERS
        for peer in self.peers:
            peer.socket.close()
        self.peers.clear()
        deadline = time.monotonic() + 10
        while many and time.monotonic() < deadline:
            with contextlib.suppress(WireError):
                self.connect().close()
                return
            time.sleep(0.05)

    @property
    def log(self) -> list[str]:
        return [line for line in self.run.log_path.read_text(encoding="utf-8").splitlines() if "control: " in line]


class Raw:
    """A peer that sends what it likes."""

    def __init__(self, path: Path, hello: bytes) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(10)
        self.socket.connect(str(path))
        self._lines = Lines(1_000_000)
        self._heard: list[dict[str, Any]] = []
        self.send(hello)

    def send(self, data: bytes) -> None:
        with suppress(OSError):  # it may have been shown out
            self.socket.sendall(data)

    def next(self, key: str) -> dict[str, Any]:
        """The next message with this key; an empty one at the end."""
        while True:
            while self._heard:
                if key in (message := self._heard.pop(0)):
                    return message
            try:
                data = self.socket.recv(65536)
            except ConnectionResetError:
                data = b""
            if not data:
                return {}
            self._heard = [parse(line) for line in self._lines.feed(data)]


@pytest.fixture(scope="module")
def endless(shared_tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    run = Served(tmp_path_factory.mktemp("served"), load_profile(str(shared_tiny), ENDLESS)).start()
    hear(run.mailbox, StepCompleted)
    yield run
    run.end()


@pytest.fixture
def served(endless: Served) -> Iterator[Served]:
    """A run that trains for ever, for tests that leave it as it is."""
    yield endless
    endless.show_out()


@pytest.fixture
def make(tmp_path: Path, tiny_profile: Callable[..., Profile]) -> Iterator[Callable[..., Served]]:
    made: list[Served] = []

    def served(folder: Path = tmp_path / "runs", **overrides: object) -> Served:
        fields = {"validate.every": 0, "checkpoint.every": 0, "train.steps": 1_000_000, **overrides}
        made.append(Served(folder, tiny_profile(**fields), f"tiny-{len(made)}"))
        return made[-1]

    yield served
    for run in made:
        if run.engine.ended is None:
            run.end()
        run.server.close()


def hear(mailbox: Mailbox, kind: type[Event], seconds: float = 20) -> list[Event]:
    """All that is said until an event of this kind."""
    heard, deadline = list[Event](), time.monotonic() + seconds
    while not any(isinstance(event, kind) for event in heard):
        assert time.monotonic() < deadline, f"no {kind.__name__} in {heard}"
        heard += mailbox.take(1.0)
    return heard


def until(connection: Connection, kind: type[Event]) -> list[Event]:
    heard: list[Event] = []
    while not any(isinstance(event, kind) for event in heard):
        heard += [read_event(message) for message in connection.receive()]
    return heard


def until_refused(connection: Connection, key: str) -> list[Event]:
    """All that is said until it is told that a setting cannot be changed."""
    heard: list[Event] = []
    while not any(isinstance(event, Notice) and f"not changed: {key}" in event.text for event in heard):
        heard += until(connection, Notice)
    return heard


def values(hint: Any) -> st.SearchStrategy[Any]:
    """Values of a field's type, as an engine might say them; whole numbers have 64 bits, as all that are stored."""
    if isinstance(hint, UnionType):
        return st.one_of(*(st.none() if choice is NoneType else values(choice) for choice in get_args(hint)))
    if hint is int:
        return st.integers(-(2**63), 2**63 - 1)
    if get_origin(hint) is Mapping:
        return st.dictionaries(st.text(), st.floats())
    return st.from_type(hint)


def said(kind: type[Event]) -> st.SearchStrategy[Event]:
    return st.builds(kind, **{field: values(hint) for field, hint in get_type_hints(kind).items() if field != "kind"})


def quickly(examples: int) -> settings:
    return settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))


class TestWire:
    @quickly(60)
    @given(st.one_of(*(said(kind) for kind in EVENTS)))
    def test_events_come_back_as_they_were(self, event: Event) -> None:
        line = event_to_line(event)
        again = read_event(parse(line))
        assert type(again) is type(event)
        assert event_to_line(again) == line  # equal also where it is NaN, or was no Unicode

    @quickly(60)
    @given(
        st.builds(Generate, WORDS, st.text(st.characters(codec="utf-8")), st.integers(1, 9), st.floats(0, 2))
        | st.builds(Set, WORDS, WORDS)
        | st.builds(Stop, WORDS, st.booleans())
        | st.sampled_from([Pause(), Resume()])
    )
    def test_commands_come_back_as_they_were(self, command: Command) -> None:
        assert read_command(parse(command_to_json(command).encode())) == command

    @quickly(60)
    @given(st.binary() | JSON.map(lambda value: json.dumps(value).encode()))
    def test_whatever_comes_in_is_a_command_or_a_refusal(self, line: bytes) -> None:
        with suppress(WireError):
            assert isinstance(read_command(parse(line)), get_args(Command))

    @quickly(60)
    @given(
        st.sampled_from(["pause", "stop", "set", "generate", "cancel_generation", "checkpoint"]),
        st.dictionaries(st.sampled_from(["reason", "checkpoint", "key", "value", "answer", "prompt", "seed"]), JSON),
    )
    def test_wrong_fields_are_refusals(self, name: str, fields: dict[str, Any]) -> None:
        with suppress(WireError):
            command = read_command({"command": name, **fields})
            assert read_command(parse(command_to_json(command).encode())) == command

    @quickly(60)
    @given(
        st.sampled_from([kind.kind for kind in EVENTS]),
        st.dictionaries(st.sampled_from(["time", "step", "state", "metrics", "text", "level", "best"]), JSON),
    )
    def test_events_are_read_as_strictly(self, name: str, fields: dict[str, Any]) -> None:
        with suppress(WireError):
            assert isinstance(read_event({"event": name, **fields}), Event)

    @quickly(60)
    @given(st.lists(st.binary(max_size=30).map(lambda line: line.replace(b"\n", b""))), st.integers(1, 7))
    def test_lines_are_cut_whatever_the_pieces(self, lines: list[bytes], size: int) -> None:
        data, cutter, cut = b"".join(line + b"\n" for line in lines), Lines(30), list[bytes]()
        for start in range(0, len(data), size):
            cut += cutter.feed(data[start : start + size])
        assert cut == lines

    def test_a_line_without_end_is_refused(self) -> None:
        cutter = Lines(100)
        with pytest.raises(WireError, match="more than 100 bytes"):
            for _ in range(11):
                cutter.feed(b"0123456789")


REFUSED = [
    (b"\xff\xfe", "no line of JSON"),
    (b"[" * 50_000, "nested too deeply"),
    (b"9" * 5_000, "no line of JSON"),
    (b"[]", "no JSON object"),
    (b"{}", "no 'command'"),
    (b'{"command": "fly"}', "unknown command 'fly'"),
    (b'{"command": ["stop"]}', "unknown command"),
    (b'{"command": "pause", "for": 3}', "pause has no 'for'"),
    (b'{"command": "set", "key": "a"}', "set needs 'value'"),
    (b'{"command": "stop", "checkpoint": 1}', "'checkpoint' cannot be 1"),
    (b'{"command": "stop", "reason": "a\\nb"}', "control characters"),
    (b'{"command": "stop", "reason": "\\ud800"}', "no Unicode"),
    (b'{"command": "stop", "reason": "' + b"a" * 2000 + b'"}', "more than 1000 characters"),
    (b'{"command": "generate", "answer": "a", "prompt": "b", "temperature": NaN}', "NaN"),
    (b'{"command": "generate", "answer": "a", "prompt": "b", "temperature": "nan"}', "'temperature' must be"),
    (b'{"command": "generate", "answer": "a", "prompt": "b", "seed": 99999999999999999999}', "too large"),
    (b'{"command": "generate", "answer": "a", "prompt": "b", "max_tokens": 0}', "'max_tokens' must be"),
    (b'{"command": "generate", "answer": "a", "prompt": "b", "top_p": true}', "'top_p' cannot be True"),
]


class TestRefusals:
    def test_each_is_answered_in_a_line_and_nothing_comes_of_it(self, served: Served) -> None:
        peer, logged, began = served.raw(), len(served.log), time.monotonic()
        for line, reason in REFUSED:
            peer.send(line + b"\n")
            refusal = peer.next("refused")["refused"]
            assert reason in refusal and "\n" not in refusal
        for command, state in (("pause", "paused"), ("resume", "training")):  # it is still listened to
            peer.send(json.dumps({"command": command}).encode() + b"\n")
            while peer.next("event").get("state") != state:
                pass
        assert len(served.log) - logged <= 1 + time.monotonic() - began, "one a second, whatever comes"

    @pytest.mark.parametrize(
        ("hello", "reason"),
        [
            (b'{"command": "stop"}\n', "the first line must be"),
            (b'{"hello": true}\n', "the first line must be"),
            (b'{"hello": 1, "looks_only": "no"}\n', "the first line must be"),
            (b'{"hello": 1, "root": true}\n', "the first line must be"),
            (b'{"hello": 2}\n', "this run speaks protocol 1, not 2"),
            (b"GET / HTTP/1.1\r\n\r\n", "no line of JSON"),
            (b"a" * (LONGEST_COMMAND_BYTES + 70_000), "a line of more than 65,536 bytes"),
        ],
    )
    def test_who_does_not_greet_is_shown_out(self, served: Served, hello: bytes, reason: str) -> None:
        peer = served.raw(b"")
        peer.send(hello)
        assert reason in peer.next("refused")["refused"]
        assert peer.next("event") == {}

    def test_a_line_too_long_ends_the_connection(self, served: Served) -> None:
        peer = served.raw()
        peer.send(b'{"command": "stop", "reason": "' + b"a" * 2 * LONGEST_COMMAND_BYTES)
        assert "a line of more than" in peer.next("refused")["refused"]
        assert peer.next("nothing") == {}

    def test_nothing_but_nonsense_ends_the_connection(self, served: Served) -> None:
        peer = served.raw()
        peer.send(b"nonsense\n" * 1000)
        assert peer.next("refused") and peer.next("nothing") == {}

    def test_who_looks_only_cannot_steer(self, served: Served) -> None:
        peer = served.raw(b'{"hello": 1, "looks_only": true}\n')
        for command in ("stop", "pause", "checkpoint"):
            peer.send(json.dumps({"command": command}).encode() + b"\n")
            assert peer.next("refused")["refused"] == f"{command}: this watcher may only look"
        assert peer.next("event"), "and goes on looking"

    def test_there_is_room_for_so_many(self, served: Served) -> None:
        peers = [served.raw() for _ in range(WATCHERS)]
        assert all(peer.next("welcome") for peer in peers)
        assert "more than 32 watchers" in served.raw().next("refused")["refused"]

    def test_other_users_would_be_known(self) -> None:
        left, right = socket.socketpair()
        with left, right:
            assert peer_uid(left) == os.geteuid()


class TestWatching:
    def test_who_comes_late_hears_where_the_run_stands(self, served: Served) -> None:
        steps = [event.step for event in hear(served.mailbox, StepCompleted) if isinstance(event, StepCompleted)]
        connection = served.connect()
        past = until(connection, StepCompleted)
        opened = [event for event in past if isinstance(event, RunOpened)]
        assert [(event.run, event.attempt) for event in opened] == [("tiny", 1)]
        assert next(event.state for event in reversed(past) if isinstance(event, StateChanged)) == "training"
        step = next(event.step for event in past if isinstance(event, StepCompleted))
        assert step >= steps[-1]
        following = [event.step for event in until(connection, StepCompleted) if isinstance(event, StepCompleted)]
        assert following[0] == step + 1
        connection.close()

    def test_all_watchers_hear_what_one_of_them_asked_for(self, served: Served) -> None:
        connections = [served.connect(), served.connect(), served.connect(looks_only=True)]
        connections[0].send(Set("model.width", "7"))
        for connection in connections:
            until_refused(connection, "model.width")
            connection.close()

    def test_an_answer_is_heard_by_who_asked_for_it(self, served: Served) -> None:
        asking, other = served.connect(), served.connect()
        asking.send(Generate("mine", "A list is", max_tokens=3))
        heard = until(asking, AnswerEnded)
        assert [event.reason for event in heard if isinstance(event, AnswerEnded)] == ["length"]
        other.send(Set("nothing.such", "1"))
        assert not any(isinstance(event, AnswerStarted) for event in until_refused(other, "nothing.such"))
        asking.close()
        other.close()

    def test_an_answer_ends_with_its_asker(self, served: Served) -> None:
        asking = served.connect()
        asking.send(Generate("long", "A list is", max_tokens=100_000))
        until(asking, AnswerStarted)
        served.mailbox.take()
        asking.close()
        heard = hear(served.mailbox, AnswerEnded)
        assert [event.reason for event in heard if isinstance(event, AnswerEnded)] == ["cancelled"]

    def test_the_end_is_heard_and_the_socket_is_gone(self, make: Callable[..., Served]) -> None:
        run = make(**{"train.steps": 5})
        run.server.start()
        connection = run.connect()
        run.engine.start()
        heard = until(connection, RunEnded)
        assert [event.step for event in heard if isinstance(event, StepCompleted)] == [1, 2, 3, 4, 5]
        assert isinstance(heard[-1], RunEnded) and heard[-1].exit_code == ExitCode.OK
        run.engine.join()
        run.server.close()
        assert not {"control.sock", "control.json"} & {path.name for path in run.run.path.iterdir()}

    def test_a_reader_that_stops_reading_holds_up_nothing(self, make: Callable[..., Served]) -> None:
        run = make(**{"train.steps": 60, "train.batch_size": 4, "train.sequence_length": 8, "model.layers": 1})
        run.server.start()
        stopped, reading = run.raw(), run.connect()
        assert stopped.next("welcome")
        for number in range(2_000):  # more than what any buffer of the system takes
            run.said.put(Notice(text=f"{number} " + "x" * 1_000))
        run.engine.start()
        heard = until(reading, RunEnded)
        assert [event.step for event in heard if isinstance(event, StepCompleted)] == list(range(1, 61))
        assert sum(isinstance(event, Notice) for event in heard) >= 2_000
        run.engine.join()
        began = time.monotonic()
        run.server.close()
        assert time.monotonic() - began < 3, "patience with it has an end"
        assert not (run.run.path / "control.sock").exists(), "its thread has ended"
        stopped.socket.close()


class TestWatcher:
    """One connection's queue, on a real pair of sockets."""

    @pytest.fixture
    def watcher(self) -> Iterator[Watcher]:
        left, self.other_end = socket.socketpair()
        left.setblocking(False)
        watcher = Watcher(left)
        watcher.welcome = True
        with left, self.other_end:
            yield watcher

    def test_old_steps_are_thinned_out_and_nothing_else(self, watcher: Watcher) -> None:
        def step(number: int) -> StepCompleted:
            return StepCompleted(step=number, total_steps=9, metrics={}, elapsed_seconds=0.0, remaining_seconds=None)

        for number in range(20_000):
            event: Event = Notice(text=f"{number}") if number % 1000 == 0 else step(number)
            watcher.put(event, to_json(event).encode() + b"\n")
        assert watcher.reason_to_leave(time.monotonic()) == ""
        lines, told = Lines(1_000_000), list[dict[str, Any]]()
        while watcher.waiting:
            watcher.flush()
            told += [parse(line) for line in lines.feed(self.other_end.recv(1_000_000))]
        assert [message["text"] for message in told if "text" in message] == [f"{n}" for n in range(0, 20_000, 1000)]
        steps = [message["step"] for message in told if "step" in message]
        assert len(steps) < 5000 and steps == sorted(steps) and steps[-1] == 19_999

    def test_who_reads_nothing_is_let_go(self, watcher: Watcher) -> None:
        assert watcher.reason_to_leave(time.monotonic() + 1e6) == "", "there is nothing to read"
        watcher.put(Notice(text=""), b"x" * 1_000_000 + b"\n")
        watcher.flush()
        assert watcher.waiting
        assert watcher.reason_to_leave(time.monotonic() + 5) == ""
        assert "read nothing" in watcher.reason_to_leave(time.monotonic() + 100)
        for _ in range(5000):
            watcher.put(Notice(text=""), b"\n")
        assert watcher.reason_to_leave(time.monotonic()) == "it does not read"


class TestTheSocketItself:
    def test_only_its_owner_may_open_it(self, served: Served) -> None:
        address = read_address(served.run)
        assert address is not None and address.pid == os.getpid()
        assert address.path == served.run.path / "control.sock"
        assert stat.S_IMODE(address.path.stat().st_mode) == 0o600

    def test_a_long_path_leads_to_a_folder_of_its_own(self, make: Callable[..., Served], tmp_path: Path) -> None:
        run = make(tmp_path / ("long" * 30)).start()
        address = read_address(run.run)
        assert address is not None and len(str(address.path)) < 104
        assert stat.S_IMODE(address.path.stat().st_mode) == 0o600
        assert stat.S_IMODE(address.path.parent.stat().st_mode) == 0o700
        connection = run.connect()
        assert until(connection, StepCompleted)
        connection.close()
        run.end()
        assert not address.path.parent.exists()

    def test_what_a_killed_process_left_is_replaced(self, make: Callable[..., Served], tmp_path: Path) -> None:
        run = make()
        old = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        old.bind(str(run.run.path / "control.sock"))
        old.close()
        run.start()
        assert run.connect().pid == os.getpid()

    def test_what_is_not_surely_ours_is_left_alone(self, make: Callable[..., Served], tmp_path: Path) -> None:
        precious = tmp_path / "retention-tui-precious" / "control.sock"
        precious.parent.mkdir()
        precious.write_text("not a socket")
        run = make()
        about = {"format": 1, "path": "/elsewhere.sock", "pid": 1, "serving": "x"}
        (run.run.path / "control.json").write_text(json.dumps(about))
        assert read_address(run.run) is None
        (run.run.path / "control.json").write_text(json.dumps({**about, "path": str(precious)}))
        with pytest.raises(WireError, match="no socket of yours"):
            run.connect()
        run.start()
        assert precious.read_text() == "not a socket"

    def test_another_run_that_answers_is_not_taken_for_this_one(self, make: Callable[..., Served]) -> None:
        asked, other = make(), make().start()
        address = {**json.loads((other.run.path / "control.json").read_text()), "serving": "mine"}
        (asked.run.path / "control.sock").symlink_to(other.run.path / "control.sock")
        (asked.run.path / "control.json").write_text(json.dumps(address))
        with pytest.raises(ConnectionRefusedError, match="something else answers there"):
            asked.connect()
        asked.start()  # what is not its own makes way
        asked.connect().close()

    def test_a_moved_run_is_found_where_it_is_now(self, make: Callable[..., Served], tmp_path: Path) -> None:
        run = make().start()
        hear(run.mailbox, StepCompleted)  # its store is open
        there = RunDirectory(run.run.path.rename(tmp_path / "moved"))
        address = read_address(there)
        assert address is not None and address.path == there.path / "control.sock"
        Connection(address).close()

    @pytest.mark.parametrize(
        "text",
        [
            '{"path": "/tmp/\\u0000/control.sock", "pid": 1, "serving": "x"}',
            '{"path": "/tmp/\\ud800/control.sock", "pid": 1, "serving": "x"}',
            '{"path": "/tmp/control.sock", "pid": 1e999, "serving": "x"}',
            '{"path": "/tmp/control.sock", "pid": 1.5, "serving": "x"}',
            '{"path": "/tmp/control.sock", "pid": true, "serving": "x"}',
            '{"path": "/tmp/control.sock", "pid": -1, "serving": "x"}',
            '{"path": "elsewhere/control.sock", "pid": 1, "serving": "x"}',
            '{"path": "/tmp/control.sock", "pid": 1}',
            "[" * 50_000,
            "9" * 5_000,
            "[]",
        ],
    )
    def test_a_strange_address_is_none(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "control.json").write_text(text)
        assert read_address(RunDirectory(tmp_path)) is None

    @quickly(40)
    @given(
        st.binary(max_size=60)
        | JSON.map(lambda value: json.dumps(value).encode())
        | st.fixed_dictionaries({"path": st.text() | JSON, "pid": JSON, "serving": st.text() | JSON}).map(
            lambda value: json.dumps(value).encode()
        )
    )
    def test_whatever_an_address_says_it_is_one_or_none(self, tmp_path: Path, data: bytes) -> None:
        (tmp_path / "control.json").write_bytes(data)
        address = read_address(RunDirectory(tmp_path))
        assert address is None or not address.path.exists()

    def test_a_run_that_cannot_be_served_is_trained(self, make: Callable[..., Served]) -> None:
        run = make(**{"train.steps": 3})
        (run.run.path / "control.json").mkdir()  # a file cannot take its place
        run.start()
        ended = run.engine.join()
        assert ended is not None and ended.exit_code == ExitCode.OK
        assert any("cannot be watched from elsewhere" in line for line in run.log)
        assert not (run.run.path / "control.sock").exists()


def losses(run: RunDirectory) -> list[float]:
    return run.curve("loss")[1].tolist()


def test_nonsense_changes_no_loss(make: Callable[..., Served]) -> None:
    """Fuzzed with bytes and JSON while it trains, a run takes the very steps that it takes alone."""
    short = {"train.steps": 100, "train.batch_size": 4, "model.layers": 1}
    alone, fuzzed = make(**short), make(**short)
    alone.start().engine.join()
    run = fuzzed.start()
    reached = 0
    letters = st.text(string.ascii_lowercase, max_size=8)
    messages = st.dictionaries(letters | st.sampled_from(["command", "hello", "reason", "key"]), JSON, max_size=4)
    lines = st.lists(st.binary(max_size=50) | messages.map(lambda value: json.dumps(value).encode()), max_size=5)

    @quickly(40)
    @given(st.booleans(), lines)
    def fuzz(greets: bool, lines: list[bytes]) -> None:
        nonlocal reached
        if run.engine.ended is None and (address := read_address(run.run)) is not None:
            with suppress(OSError):  # the run may end, or show it out, at any moment
                peer = Raw(address.path, b'{"hello": 1}\n' if greets else b"")
                peer.socket.sendall(b"".join(line + b"\n" for line in lines))
                peer.socket.close()
                reached += 1

    fuzz()
    assert reached > 10
    ended = run.engine.join()
    assert ended is not None and (ended.exit_code, ended.step) == (ExitCode.OK, 100)
    run.server.close()
    assert losses(run.run) == losses(alone.run)
    assert not any("Traceback" in line for line in run.run.log_path.read_text().splitlines())
