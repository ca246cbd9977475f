"""The screen of one run: its head, its charts, a chat with it, its log, and the keys that steer it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, ClassVar, cast

from textual import work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.screen import Screen
from textual.widgets import Input, TabbedContent, TabPane
from textual.worker import get_current_worker

from engine.commands import Checkpoint, Command, Pause, Resume, Stop, Validate
from engine.errors import UserError
from engine.events import (
    Alarm,
    AnswerEnded,
    AnswerText,
    Event,
    LoadingProgress,
    Notice,
    Reading,
    RunEnded,
    RunOpened,
    State,
    StepCompleted,
)
from engine.profile_files import validate_profile
from retention_tui.client import Client, ConnectionLost, Reconnected
from retention_tui.foresight import ask_for_plan
from retention_tui.history import Series
from retention_tui.marks import Mark, load_marks
from retention_tui.progress import Entry, Progress, empty_history, load_entries, load_history
from retention_tui.screens.help import Help
from retention_tui.screens.quit import QuitQuestion, StopQuestion
from retention_tui.screens.setting import SettingQuestion
from retention_tui.visits import last_look
from retention_tui.widgets.chat import Chat
from retention_tui.widgets.happening import Happening
from retention_tui.widgets.header import RunHeader
from retention_tui.widgets.keybar import KeyBar
from retention_tui.widgets.log import EventLog
from retention_tui.widgets.monitor import Monitor
from retention_tui.widgets.plan import PlanPage

POLL_SECONDS = 1 / 8
NUMBERS_SECONDS = 1 / 2
CHARTS_SECONDS = 1.0  # a round of charts costs some 20 ms, which training would feel if it came more often
STEERING = {"pause", "checkpoint", "validate", "set", "stop"}
"""Ids of the keys that mean nothing once the run has ended, or where one may only look."""

Move = Callable[[bool], Client | None]
"""Moves this process's run to the background, paused or not; None where it ended otherwise meanwhile."""


class RunScreen(Screen[None]):
    """Folds the run's events into a `Progress` and shows it. With `home` there is a launcher to go back to.

    A run of another process is watched: leaving asks nothing. One of this process can `move` to the background.
    """

    AUTO_FOCUS = None
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("space", "pause", "Pause ", key_display="Space", id="pause", tooltip="Pause or go on"),
        Binding("c", "checkpoint", "Checkpoint", id="checkpoint", tooltip="Save the last completed step now"),
        Binding("v", "validate", "Validate", id="validate", tooltip="Measure the held-out loss now"),
        Binding("l", "set", "Set", id="set", tooltip="Change the learning rate, or another setting"),
        Binding("s", "stop", "Stop", id="stop", tooltip="End the run with a checkpoint"),
        Binding("escape", "give_up", "Stop", show=False, key_display="Esc", tooltip="Stop what is still being loaded"),
        Binding("b", "background", "Background", id="background", tooltip="Go on in a process of its own"),
        Binding("n", "next_chart", "Chart", id="next", tooltip="Make the next chart the large one"),
        Binding("z", "zoom", "Zoom", id="zoom", tooltip="Show the large chart alone, or all of them"),
        Binding("a", "read_alarms", "Read alarms", show=False, id="alarms", tooltip="All alarms count as read"),
        Binding("1", "tab('monitor')", "Monitor", show=False, tooltip="Show the charts"),
        Binding("2", "tab('chat')", "Chat", show=False, tooltip="Talk with the model"),
        Binding("3", "tab('log')", "Log", show=False, tooltip="Show what happened"),
        Binding("4", "tab('plan')", "Plan", show=False, tooltip="Show what it needs, predicted and measured"),
        Binding(
            "ctrl+t",
            "weights",
            "Weights",
            show=False,
            key_display="Ctrl+T",
            tooltip="Chat with the live weights, with the base, or with both",
        ),
        Binding("slash", "app.command_palette", "Commands", key_display="/", id="commands", tooltip="All commands"),
        Binding("question_mark", "help", "Help", key_display="?", id="help", tooltip="Keys and charts"),
        Binding("q", "quit", "Quit", id="quit", tooltip="Stop and quit, or leave the screen"),
    ]

    def __init__(self, client: Client, *, home: bool = False, move: Move | None = None) -> None:
        super().__init__()
        self._client, self._home, self._move = client, home, move
        # What of a run of another process has been read on an earlier visit is not unread again.
        self._progress = Progress() if client.here else Progress(last_look(client.run.path.parent, client.run.name))
        self._quitting = self._moving = self._past_shown = self._planning = False
        self._planned: Any = None
        """What had been changed in the run when its plan was made; None before that."""
        self._end: RunEnded | None = None

    def compose(self) -> ComposeResult:
        looking = " · looking only" if self._client.looks_only else ""
        yield RunHeader(self._progress, self._client.run.name + looking)
        with TabbedContent(initial="monitor"):
            with TabPane("[bold $primary]1[/] Monitor", id="monitor"):
                yield Monitor(self._progress)
            with TabPane("[bold $primary]2[/] Chat", id="chat"):
                yield Chat(self._send)
            with TabPane("[bold $primary]3[/] Log", id="log"):
                yield EventLog(self._progress)
            with TabPane("[bold $primary]4[/] Plan", id="plan"):
                yield PlanPage(self._progress)
        yield Happening(self._progress)
        yield KeyBar(cast(list[Binding], self.BINDINGS))

    def on_mount(self) -> None:
        self.set_interval(POLL_SECONDS, self._poll)
        self.set_interval(NUMBERS_SECONDS, self._show_numbers)
        self.set_interval(CHARTS_SECONDS, self._draw_charts)
        self._draw_charts()
        self._suit_client()

    def on_unmount(self) -> None:
        self._client.close()

    def _suit_client(self) -> None:
        self.set_class(not self._can_move, "-elsewhere")
        if self._client.looks_only:
            self.query_one(Chat).close("this screen may only look")
        self._show_keys()

    # From the engine

    def _poll(self) -> None:
        events = self._client.events()
        for event in events:
            if self._moving and isinstance(event, RunEnded):
                self._end = event  # it goes on, if all goes well
            else:
                self._apply(event)
        if any(isinstance(event, AnswerText | AnswerEnded) for event in events):
            self.query_one(Chat).show_answers()
        if any(not isinstance(event, StepCompleted | AnswerText | Reading | LoadingProgress) for event in events):
            self._show_all()

    def _show_all(self) -> None:
        self.query_one(EventLog).show_progress()
        self.query_one(Happening).refresh()
        self._show_keys()
        self._show_numbers()

    def _apply(self, event: Event) -> None:
        self._progress.apply(event)
        self._take(event)

    def _show_numbers(self) -> None:
        self.query_one(RunHeader).refresh()
        if self._shown_tab == "plan":
            self.query_one(PlanPage).show_progress()

    def _take(self, event: Event) -> None:
        match event:
            case RunOpened() | Reconnected():
                if isinstance(event, RunOpened):
                    self.query_one(Chat).suit(event)
                self._load_past()
            case RunEnded() | ConnectionLost():
                self.query_one(Chat).close()
                self._draw_charts()
                if self._quitting:
                    self.app.exit()
            case _:
                self.query_one(Chat).take(event)
        if isinstance(event, Notice | Alarm) and self._shown_tab == "plan":  # a setting may have been changed
            self._keep_planned()

    @work(thread=True, exclusive=True, group="past", exit_on_error=False)
    def _load_past(self) -> None:
        """In a thread: reads what the store knows of the run. What comes meanwhile goes on top of it."""
        worker = get_current_worker()
        history: dict[str, Series] = empty_history()
        entries: list[Entry] = []
        marks: list[Mark] = []
        try:
            history = load_history(self._client.run)
            if not self._past_shown:
                entries = load_entries(self._client.run, self._progress.began)
                marks = load_marks(self._client.run, self._progress.began)
        except Exception as error:  # a damaged file costs the past, not the screen
            self.app.call_from_thread(self._progress.note, f"earlier steps cannot be shown: {error}")
        if not worker.is_cancelled:
            self.app.call_from_thread(self._show_past, history, entries, marks)

    def _show_past(self, history: dict[str, Series], entries: list[Entry], marks: list[Mark]) -> None:
        self._past_shown = True
        self._progress.adopt_history(history)
        self._progress.adopt_entries(entries)
        self._progress.adopt_marks(marks)
        self.query_one(EventLog).rewrite()

    def _keep_planned(self) -> None:
        """Plans the run, where that was not done yet, or something was changed in it since."""
        if self._client.looks_only:  # each of any number of visitors would start a process
            self.query_one(PlanPage).say("no plan is made for who may only look")
        elif not self._planning:
            self._planning = True
            self._plan()

    @work(thread=True, group="plan", exit_on_error=False)
    def _plan(self) -> None:
        """In a thread: plans the run as if it were to start now, and again as long as it is changed meanwhile."""
        run, page, worker = self._client.run, self.query_one(PlanPage), get_current_worker()
        try:
            while (changes := run.identity().get("amendments", [])) != self._planned and not worker.is_cancelled:
                self._planned = changes
                table = ask_for_plan(run.path, run.path.parent, given_up=lambda: worker.is_cancelled)
                if table is not None:
                    self.app.call_from_thread(page.take, table)
        except UserError as error:
            self.app.call_from_thread(page.say, str(error))
        finally:
            self._planning = False

    def _draw_charts(self) -> None:
        if self._shown_tab == "monitor":
            self.query_one(Monitor).show_progress()

    def _show_keys(self) -> None:
        paused = self._progress.state is State.PAUSED
        disabled = {"pause", "stop", "background"} if self._stopping else set[str]()
        if self._progress.over or self._client.looks_only:
            disabled = STEERING | {"background"}
        renamed = {"pause": "Resume"} if paused else {}
        typing = isinstance(self.focused, Input)
        self.query_one(KeyBar).show_state(renamed=renamed, disabled=disabled, keys_work=not typing)

    # Keys

    @property
    def _shown_tab(self) -> str:
        return self.query_one(TabbedContent).active

    @property
    def _can_move(self) -> bool:
        return self._move is not None and self._client.here

    @property
    def _is_loading(self) -> bool:
        """Whether nothing can have been trained yet."""
        return self._progress.state is State.LOADING and self._progress.opened is None

    @property
    def _stopping(self) -> bool:
        return self._progress.state is State.STOPPING

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        if action == "give_up":
            return self._is_loading and self.check_action("stop", ()) and not self._stopping
        if action == "background":
            return self._can_move and not self._progress.over and not self._stopping
        return not (action in STEERING and (self._progress.over or self._client.looks_only))

    def action_pause(self) -> None:
        if self._progress.state is State.PAUSED:
            self._ask(Resume(), "going on")
        else:
            self._ask(Pause(), "pausing after this micro-batch")

    def action_checkpoint(self) -> None:
        self._ask(Checkpoint(), "a checkpoint was asked for")

    def action_validate(self) -> None:
        self._ask(Validate(), "a validation was asked for")

    @work
    async def action_set(self) -> None:
        try:
            identity = await asyncio.to_thread(self._client.run.identity)
            profile = validate_profile(identity["profile"], where="run.json")
        except UserError as error:
            self._note(str(error))
            return
        setting = await self.app.push_screen_wait(SettingQuestion(profile, self._progress.metrics.get("learning_rate")))
        if setting is not None:
            self._ask(setting, f"{setting.key} = {setting.value} was asked for")

    def action_stop(self) -> None:
        def answered(choice: str | None) -> None:
            if choice == "stop":
                self._stop()

        self.app.push_screen(StopQuestion(self._client.run.name, loading=self._is_loading), answered)

    def action_give_up(self) -> None:
        self.action_stop()

    @work
    async def action_background(self) -> None:
        """Saves the run, goes on with it in a process of its own, and watches that: on the same screen."""
        assert self._move is not None
        paused = self._progress.state is State.PAUSED and not self._progress.reason  # not where a guard holds it
        self._moving = True
        self._note("moving to the background: saved first, then a process of its own goes on from there")
        self._expect_stop()
        failure = ""
        try:
            client = await asyncio.to_thread(self._move, paused)
        except UserError as error:
            client, failure = None, str(error)
        self._poll()
        self._moving = False
        if client is not None:
            self._client = client
            self._note("it goes on in the background; leaving this screen leaves it alone")
            self._suit_client()
        elif self._end is not None:
            self._apply(self._end)
        if failure:
            words = f"not in the background: {failure}; retention-tui resume {self._client.run.name} goes on with it"
            self._apply(Alarm(level="critical", text=words))
        self._show_all()

    def action_quit(self) -> None:
        """Leaves an ended run, or one of another process, at once; asks what becomes of one that goes on here."""

        def answered(choice: str | None) -> None:
            if choice == "detach":
                self.app.exit("detach")
            elif choice == "stop":
                self._quitting = True
                self._stop()

        if self._moving:
            if not self._home:
                self.app.exit()  # whoever ran the app waits for the move
        elif self._client.here and not self._progress.over:
            question = QuitQuestion(self._client.run.name, stopping=self._stopping, loading=self._is_loading)
            self.app.push_screen(question, answered)
        elif self._home:
            self.dismiss()
        else:
            self.app.exit()

    def action_next_chart(self) -> None:
        self.query_one(Monitor).next_chart()

    def action_zoom(self) -> None:
        self.query_one(Monitor).toggle_class("alone")

    def action_tab(self, tab: str) -> None:
        self.query_one(TabbedContent).active = tab
        if tab == "chat":
            self.query_one(Chat).focus_input()

    def action_weights(self) -> None:
        """The chat asks other weights; where it is not seen, it is shown first."""
        if self._shown_tab == "chat":
            self.query_one(Chat).next_weights()
        else:
            self.action_tab("chat")

    def action_read_alarms(self) -> None:
        """Counts all alarms as read; where there are several, the log shows them."""
        if len(self._progress.unread) > 1:
            self.action_tab("log")
        self._progress.read_alarms()
        self.query_one(Happening).refresh()

    def action_help(self) -> None:
        self.app.push_screen(Help(self.active_bindings.values()))

    def on_descendant_focus(self) -> None:
        self._show_keys()
        self.query_one(Happening).refresh()

    def on_descendant_blur(self) -> None:
        self._show_keys()
        self.query_one(Happening).refresh()

    def on_tabbed_content_tab_activated(self, event: TabbedContent.TabActivated) -> None:
        event.stop()
        if event.pane.id == "chat":
            self.query_one(Chat).focus_input()
        else:
            self.set_focus(self.query_one(PlanPage) if event.pane.id == "plan" else None)
        if event.pane.id == "plan":
            self._keep_planned()
        self._draw_charts()

    def _ask(self, command: Command, said: str) -> None:
        """Sends a command; the engine answers with an event once it has come to it."""
        self._send(command)
        self._note(said)

    def _send(self, command: Command) -> None:
        self._client.send(command)  # not always the client of the beginning

    def _note(self, said: str) -> None:
        self._progress.note(said)
        self.query_one(Happening).refresh()

    def _stop(self) -> None:
        """Asks the run to end. Its own word for it may take until the end of the micro-batch."""
        after = "" if self._is_loading else ": a checkpoint is written after this micro-batch"
        self._ask(Stop(), f"stopping{after}")
        self._expect_stop()

    def _expect_stop(self) -> None:
        self._progress.expect_stop()
        self.query_one(RunHeader).refresh()
        self._show_keys()
