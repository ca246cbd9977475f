"""Fine-tuning as a person meets it: base and adapter side by side, a download that can be stopped, plan and measure."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import re
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
from hub_stand_in import HubStandIn, hub_stand_in
from ride import Ride
from test_tui_app import _impatient_pilot, click, seen, step_shown, until  # noqa: F401
from test_tui_widgets import OneChat
from textual.app import App, ComposeResult
from textual.pilot import Pilot
from textual.widgets import Input
from tiny_llama import write_rows, write_tiny_llama

from engine.commands import CancelGeneration, Generate
from engine.environment import environment
from engine.events import (
    AnswerEnded,
    AnswerText,
    LoadingProgress,
    MemoryHeld,
    RunEnded,
    RunOpened,
    State,
    StateChanged,
    StepCompleted,
    to_json,
)
from engine.lines import LineWriter, describe
from engine.planner import plan
from engine.planning.report import as_table
from engine.profile import Profile
from engine.profile_files import list_profiles, load_profile
from engine.runs import create_run, list_runs
from engine.wire import parse, read_event
from retention_tui.app import RetentionApp
from retention_tui.client import Client
from retention_tui.progress import Progress
from retention_tui.remote import RemoteClient
from retention_tui.screens.launcher import Launcher
from retention_tui.screens.quit import Question
from retention_tui.session import Session
from retention_tui.widgets.chat import Chat
from retention_tui.widgets.choices import Choices
from retention_tui.widgets.header import RunHeader
from retention_tui.widgets.plan import PlanPage, page
from retention_tui.widgets.turn import Answer

QUESTION = "What is passage 3 about?"
TUNED = """
kind = "lora"
description = "a small adapter"
[model]
init_from = "{base}"
[adapter]
rank = 4
dropout = 0.1
[data]
files = ["rows/train.jsonl"]
[train]
steps = 1000000
batch_size = 4
micro_batch_size = 2
backward = "layerwise"
sequence_length = 64
learning_rate = 3e-2
warmup_steps = 0
schedule = "constant"
[validate]
every = 0
[checkpoint]
every = 0
[host]
keep_awake = false
"""


def write_profile(folder: Path, base: str | Path) -> Path:
    write_rows(folder / "rows", 24)
    profile = folder / "tuned.toml"
    profile.write_text(TUNED.format(base=base), encoding="utf-8")
    return profile


@pytest.fixture
def tuned(tmp_path: Path, tiny_llama: Path) -> Path:
    """The file of a profile that fine-tunes the tiny Llama."""
    return write_profile(tmp_path, tiny_llama)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStandIn]:
    """A hub that gives half of its one model, of some 5 MB, and then waits; and an empty cache."""
    with hub_stand_in() as hub:
        hub.bytes_a_second, hub.holds_at = 3e6, 2_500_000
        model = write_tiny_llama(tmp_path / "served", width=128, hidden=512, layers=5)
        hub.repositories["models/owner/tiny"] = {"main": model}
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.address)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        yield hub


# The chat


def answers(app: App[str]) -> list[Answer]:
    return list(app.screen.query(Answer))


async def ask(pilot: Pilot[str], question: str) -> None:
    prompt = pilot.app.screen.query_one("#prompt", Input)
    prompt.value = question
    await prompt.action_submit()


async def test_base_and_adapter_answer_side_by_side_also_from_elsewhere(session: Session, tuned: Path) -> None:
    here = session.start(str(tuned))
    client: Client = RemoteClient(here.run)
    app = RetentionApp(session, client)
    async with app.run_test(size=(130, 40)) as pilot:
        await until(pilot, lambda: "● training" in seen(app) and step_shown(app) > 3)  # so that both are not the same
        await pilot.press("2")
        await until(pilot, lambda: "● both" in seen(app))  # what is taught on top of a base is compared with it
        temperature, tokens = (app.screen.query_one(f"#set-{name}", Input) for name in ("temperature", "max_tokens"))
        temperature.value, tokens.value = "0", "9"
        await ask(pilot, QUESTION)
        await until(pilot, lambda: len(answers(app)) == 2 and all(answer.ended for answer in answers(app)))
        live, base = answers(app)
        await until(pilot, lambda: (live.region.y, live.region.right) == (base.region.y, base.region.x))
        await until(pilot, lambda: re.search(r"live · weights of step \d+ .* base · before training", seen(app)))
        # At least the base's answer is as long as it may be; what learns may end its own earlier.
        await until(pilot, lambda: re.search(r" 9 tokens · \d+ tok/s · full length", seen(app)))
        await pilot.resize_terminal(80, 24)
        await until(pilot, lambda: base.region.y > live.region.y and base.region.x == live.region.x)
        await pilot.press("ctrl+t")
        await until(pilot, lambda: "● live" in seen(app))
        await click(pilot, "#weights-base")
        await ask(pilot, QUESTION)
        await until(pilot, lambda: len(answers(app)) == 3 and answers(app)[2].ended)
        again = answers(app)[2]
        assert again.ask.base and again.text == base.text != live.text
    client.close()
    session.stop("enough was asked")
    assert session.finish() == 0
    assert base.text == mlx_lm_says(session, QUESTION, 9)


def mlx_lm_says(session: Session, question: str, tokens: int) -> str:
    """What mlx-lm has the base of the newest run answer, the likeliest token each time."""
    from mlx_lm import generate, load

    [run] = list_runs(session.runs_folder)
    profile = load_profile(str(run.path.parent.parent / "tuned.toml"))
    assert profile.kind == "lora"
    model, tokenizer, *_ = load(str(profile.model_dump()["model"]["init_from"]))
    messages = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    return str(generate(model, tokenizer, prompt, max_tokens=tokens))


async def test_what_is_typed_for_sampling_is_brought_into_its_range_and_asked_for() -> None:
    app = OneChat()
    async with app.run_test(size=(110, 30)) as pilot:
        for name, typed in {"temperature": "1.5", "top_p": "7", "max_tokens": "", "seed": "x12"}.items():
            app.query_one(f"#set-{name}").focus()
            await pilot.press("home", "ctrl+k", *typed, "enter")
            await until(pilot, lambda: app.focused is app.query_one("#prompt"))
        shown = [app.query_one(f"#set-{name}", Input).value for name in ("temperature", "top_p", "max_tokens", "seed")]
        assert shown == ["1.5", "1", "256", "12"]
        await pilot.press("T", "enter")
        app.query_one(Chat).next_weights()
        await pilot.press("U", "enter")
        app.query_one(Chat).next_weights()
        await pilot.press("V", "enter")
        asked = [dataclasses.replace(ask, answer="") for ask in app.sent if isinstance(ask, Generate)]
    wanted = Generate("", "", max_tokens=256, temperature=1.5, top_p=1.0, seed=12)
    told = [("T", False), ("U", True), ("V", False), ("V", True)]  # live, base, both
    assert asked == [dataclasses.replace(wanted, prompt=prompt, base=base) for prompt, base in told]


class ChatAsItLooks(OneChat):
    CSS_PATH = [f"../retention_tui/widgets/{name}.tcss" for name in ("chat", "sampling", "turn")]
    HORIZONTAL_BREAKPOINTS = RetentionApp.HORIZONTAL_BREAKPOINTS


async def test_a_long_answer_pushes_no_short_one_off_the_screen() -> None:
    app = ChatAsItLooks()
    async with app.run_test(size=(80, 24)) as pilot:
        chat = app.query_one(Chat)
        chat.focus_input()
        chat.next_weights()
        chat.next_weights()
        await pilot.press("U", "enter")
        await pilot.pause()
        live, base = (ask for ask in app.sent if isinstance(ask, Generate))
        for ask, lines in (live, 2), *[(base, 10)] * 4:
            chat.take(AnswerText(answer=ask.answer, text=f"said by {'base' if ask.base else 'live'}\n" * lines))
            chat.show_answers()
            await pilot.pause()
        above, below = answers(app)

        def both_seen() -> bool:
            room = app.query_one("#transcript").region
            return all(room.contains_region(answer.region) and answer.region.height > 4 for answer in (above, below))

        await until(pilot, lambda: both_seen() and above.region.bottom == below.region.y)
        assert seen(app).count("said by live") == 2 and below.region.height > above.region.height
        assert below.max_scroll_y > 20 and below.scroll_y == 0
        await pilot.press("pagedown")
        await until(pilot, lambda: below.scroll_y > 0)
        chat.take(AnswerText(answer=live.answer, text="said by live\n" * 30))
        chat.show_answers()
        await until(pilot, lambda: both_seen() and above.max_scroll_y > 20 and below.scroll_y > 0)
        assert abs(above.region.height - below.region.height) <= 1
        await pilot.resize_terminal(110, 24)
        await until(pilot, lambda: both_seen() and above.region.y == below.region.y and above.region.height > 12)
        await pilot.press("V", "enter")
        await until(pilot, lambda: below.region.height > 40 and len(answers(app)) == 4)  # to be scrolled to, in full


async def test_escape_cancels_all_that_is_coming_in_and_then_leaves() -> None:
    app = OneChat()
    async with app.run_test(size=(110, 24)) as pilot:
        app.query_one(Chat).focus_input()
        await pilot.press("U", "enter", "V", "enter", "escape")
        asked = {command.answer for command in app.sent if isinstance(command, Generate)}
        cancelled = {command.answer for command in app.sent if isinstance(command, CancelGeneration)}
        assert cancelled == asked and len(asked) == 2 and app.focused is app.query_one("#prompt")
        await pilot.press("escape")
        assert app.focused is None


async def test_a_window_that_was_too_small_for_the_prompt_gives_it_the_keys_back() -> None:
    app = OneChat()
    async with app.run_test(size=(110, 24)) as pilot:
        prompt = app.query_one("#prompt")
        app.query_one(Chat).focus_input()
        app.query_one(Chat).styles.display = "none"  # as in a window without room for it
        await until(pilot, lambda: app.focused is None)
        app.query_one(Chat).styles.display = "block"
        await until(pilot, lambda: app.focused is prompt)
        await pilot.press("escape")
        await pilot.resize_terminal(80, 24)
        await pilot.pause()
        assert app.focused is None  # it was left on purpose


def ride(folder: Path, profile: Profile) -> Ride:
    identity = {"profile": profile.model_dump(mode="json", by_alias=True), "environment": environment()}
    return Ride(create_run(folder / "runs", "tuned", identity), profile)


def test_questions_to_the_base_change_nothing_of_the_training(tuned: Path, tmp_path: Path) -> None:
    losses = []
    for asked in (0, 3):
        run = ride(tmp_path, load_profile(str(tuned), ["train.steps=6"]))
        for number in range(asked):
            run.send(Generate(f"{number}", QUESTION, max_tokens=4, base=True, seed=number % 2))
        assert run.end().state is State.FINISHED
        losses.append([event.metrics["loss"] for event in run.of(StepCompleted)])
        texts = ["".join(e.text for e in run.of(AnswerText) if e.answer == f"{number}") for number in range(asked)]
        assert len(run.of(AnswerEnded)) == asked and texts[::2] == texts[:1] * len(texts[::2])
    assert losses[0] == losses[1]  # with dropout, whose random numbers nothing else may take


# Plan and measure


def test_the_plan_is_set_beside_what_was_measured_part_by_part(tuned: Path, tmp_path: Path) -> None:
    profile = load_profile(str(tuned), ["train.steps=2"])
    run = ride(tmp_path, profile)
    assert run.end().state is State.FINISHED
    [held] = run.of(MemoryHeld)
    table, progress = as_table(plan(profile)), Progress()
    for event in run.events:
        progress.apply(read_event(parse(to_json(event).encode())))
    for name in ("frozen_weights", "trained_weights", "optimizer_state"):
        assert table["components"][name] == pytest.approx(held.held_bytes[name], rel=0.01)
    said = "\n".join(line.plain for line in page(table, progress, 120))
    for name in ("frozen weights", "trained weights", "optimizer state"):
        assert re.search(rf"{name} +\S+ kB +\S+ kB +1\.00 × +[█▏]", said)
    peak = re.search(r"MLX's peak +\S+ .B +\S+ .B +([\d.]+) ×", said)
    measured = run.of(StepCompleted)[-1].metrics["peak_memory_bytes"]
    assert peak and float(peak[1]) == pytest.approx(table["predicted_peak_bytes"] / measured, abs=0.01)
    saved = [saving for saving in table["savings"] if saving["bytes"] > 0]
    assert saved and all(saving["name"] in said for saving in saved)


class OnePlan(App[None]):
    def compose(self) -> ComposeResult:
        yield PlanPage(Progress())


async def test_a_plan_that_is_longer_than_the_screen_is_scrolled_by_keys(tuned: Path) -> None:
    app = OnePlan()
    async with app.run_test(size=(80, 14)) as pilot:
        app.query_one(PlanPage).take(as_table(plan(load_profile(str(tuned)))))
        app.query_one(PlanPage).focus()
        await pilot.pause()
        assert "frozen weights" in seen(app) and "what is saved" not in seen(app)
        await pilot.press("end")
        await until(pilot, lambda: "what is saved" in seen(app) and "frozen weights" not in seen(app))


# What comes before the training


async def test_a_download_is_shown_can_be_stopped_and_is_gone_on_with(
    session: Session, hub: HubStandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_profile(tmp_path, "owner/tiny")
    monkeypatch.setenv("RETENTION_TUI_PROFILES", str(tmp_path))
    app = RetentionApp(session)
    async with app.run_test(size=(130, 40)) as pilot:
        await until(pilot, lambda: "your own" in seen(app))
        choices = app.screen.query_one(Choices)
        choices.highlighted = [option.id for option in choices.options].index("profile:tuned")
        await pilot.press("enter")
        how_far = r"downloading owner/tiny\s+[1-4] of 5 MB"
        await until(pilot, lambda: re.search(how_far, seen(app)))
        assert session.client is not None
        watcher = await asyncio.to_thread(RemoteClient, session.client.run)
        assert watcher.arrived.wait(5) and any(isinstance(event, LoadingProgress) for event in watcher.events())
        watcher.close()
        await pilot.press("escape")
        await until(pilot, lambda: isinstance(app.screen, Question) and "nothing was trained yet" in seen(app))
        await pilot.press("s")
        await until(pilot, lambda: "● stopped" in seen(app) and "while downloading owner/tiny" in seen(app))
        await pilot.press("q")
        await until(pilot, lambda: isinstance(app.screen, Launcher) and "● tuned" in seen(app))
        await pilot.press("end")
        await until(pilot, lambda: "● stopped  stopped on request while downloading owner/tiny" in seen(app))
        hub.holds_at = math.inf
        await pilot.press("enter")
        await until(pilot, lambda: "● training" in seen(app) and "step" in seen(app))
    assert any(bytes_from.startswith("bytes=") for bytes_from in hub.ranges)  # it went on where it was stopped


def downloading(moment: float, done: float, total: float | None = 1e9, unit: str = "bytes") -> LoadingProgress:
    return LoadingProgress(time=moment, what="downloading owner/tiny", done=done, total=total, unit=unit)


def test_a_download_has_few_lines_and_all_of_its_events() -> None:
    writer = LineWriter()
    steady = [line for tenth in range(1001) for line in writer.lines(downloading(tenth / 100, tenth * 1e6))]
    assert steady[0] == "downloading owner/tiny: 0.00 of 1.00 GB (0 %)"
    assert steady[-1] == "downloading owner/tiny: 1.00 of 1.00 GB (100 %)"
    assert len(steady) == 11
    stalled = [line for second in range(100) for line in writer.lines(downloading(100 + second, 1e6))]
    assert len(stalled) == 10
    unknown = writer.lines(downloading(300, 4000, None, "rows"))
    assert unknown == ["downloading owner/tiny: 4,000 rows"]
    event = downloading(1.0, 2.0, None)
    assert read_event(parse(to_json(event).encode())) == event


def test_a_line_says_how_much_of_the_model_learns() -> None:
    opened = RunOpened(
        run="night", directory="runs/night", task="lora", device="cpu", dtype="float32", parameters=5000, step=0,
        total_steps=9, attempt=1, trained_parameters=40,
    )  # fmt: skip
    assert "night: lora, 40 of 5,000 parameters trained, float32" in str(describe(opened))
    assert "lora, 5,000 parameters, float32" in str(describe(dataclasses.replace(opened, trained_parameters=5000)))


class Head(App[None]):
    CSS_PATH = ["../retention_tui/widgets/header.tcss"]

    def __init__(self, progress: Progress) -> None:
        super().__init__()
        self._progress = progress

    def compose(self) -> ComposeResult:
        yield RunHeader(self._progress, "night")


@pytest.mark.parametrize("size", [(40, 12), (80, 24), (130, 40)])
async def test_the_head_says_how_far_how_fast_and_how_long(size: tuple[int, int]) -> None:
    progress = Progress()
    progress.apply(StateChanged(state=State.LOADING, reason="data and model"))
    for second in range(11):
        progress.apply(downloading(second, second * 1e7))
    app = Head(progress)
    async with app.run_test(size=size):
        header = app.query_one(RunHeader)
        header.styles.height = 5
        header.refresh()
        await _settle(app)
        said = header.render().plain
    assert "downloading" in said and "0.10 of 1.00 GB" in said and "1 m 30 s left" in said
    assert ("10 MB/s" in said) is (size[0] >= 80)
    assert re.search(r"━+╸?─+ +10 %", said)
    progress.apply(RunEnded(state=State.STOPPED, reason="stopped on request", exit_code=0, step=0))
    assert progress.loading is None


async def _settle(app: App[None]) -> None:
    from textual._wait import wait_for_idle

    await wait_for_idle(0.05)


# The launcher


class List(App[None]):
    def compose(self) -> ComposeResult:
        yield Choices()


async def test_profiles_are_listed_under_the_names_of_their_kinds() -> None:
    profiles = list_profiles()
    app = List()
    async with app.run_test(size=(60, 60)) as pilot:
        app.query_one(Choices).show(profiles, [])
        await pilot.pause()
        options = [(str(option.prompt).strip(), option.id) for option in app.query_one(Choices).options]
    names = [name for name, _ in options]
    assert names.index("language") < names.index("demo") < names.index("LoRA") < names.index("lora-demo")
    assert names.count("language") == names.count("LoRA") == 1
    assert {ident for _, ident in options if ident} == {f"profile:{profile.name}" for profile in profiles}
