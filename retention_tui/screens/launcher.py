"""Where the app begins without a run: the profiles that can be started, and the runs that there are."""

from __future__ import annotations

import asyncio
import os
import platform
import time
from collections.abc import Callable
from typing import ClassVar, cast

import psutil
from textual import work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal
from textual.content import Content
from textual.screen import Screen
from textual.widgets import OptionList, Static
from textual.worker import get_current_worker

from engine.errors import UserError
from engine.events import State
from engine.profile import Profile
from engine.profile_files import ProfileFile, list_profiles, load_profile
from engine.runs import DAMAGED, list_runs
from engine.store import RunDirectory, RunSummary
from retention_tui import wording
from retention_tui.background import Background
from retention_tui.client import Client
from retention_tui.foresight import ask_for_plan
from retention_tui.history import Series
from retention_tui.plan_view import Table
from retention_tui.remote import RemoteClient
from retention_tui.screens.help import Help
from retention_tui.screens.run import RunScreen
from retention_tui.session import Session
from retention_tui.story import News, while_away
from retention_tui.theme import FAINT
from retention_tui.visits import remember_look
from retention_tui.widgets.choices import CHOOSE, Choices
from retention_tui.widgets.details import CURVES, Details
from retention_tui.widgets.keybar import KeyBar
from retention_tui.widgets.while_away import WhileAway

_PLAN_AFTER_SECONDS = 0.4
"""A profile that is only passed by is not planned."""

REFRESH_SECONDS, REFRESH_SHARE = 3.0, 0.05
"""How often the lists are read, and what part of the time that may take at most."""


class Launcher(Screen[None]):
    """Lists profiles and runs; Enter starts, resumes or watches. What a user can mend is said in one line."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding(
            "enter",
            "choose",
            "Start ",
            key_display="Enter",
            id="choose",
            tooltip=CHOOSE,
        ),
        Binding("b", "background", "Background", id="background", tooltip="Start or resume it in a process of its own"),
        Binding("m", "measure", "Measure", id="measure", tooltip="Take real steps of the profile, for its plan"),
        Binding("r", "refresh", "Refresh", id="refresh", tooltip="Read profiles and runs again"),
        Binding("escape", "dismiss_news", "Dismiss", show=False, key_display="Esc", tooltip="Dismiss what happened"),
        Binding("slash", "app.command_palette", "Commands", key_display="/", id="commands", tooltip="All commands"),
        Binding("question_mark", "help", "Help", key_display="?", id="help", tooltip="What the keys do"),
        Binding("q", "quit", "Quit", id="quit", tooltip="Leave the app"),
    ]

    def __init__(self, session: Session) -> None:
        super().__init__()
        self._session = session
        self._profiles: dict[str, ProfileFile] = {}
        self._runs: dict[str, RunSummary] = {}
        self._plans: dict[str, Table] = {}
        self._order: list[str] = []
        self._detailed = ""
        self._refresh_at = 0.0
        self.told_until: float | None = None
        """Up to when it has told what happened, in seconds since the epoch; None while it has not yet looked."""
        self._dismissed_until = 0.0
        self._run_shown = ""
        self._busy = self._quitting = False

    def compose(self) -> ComposeResult:
        with Horizontal(id="head"):
            yield Static("retention-tui", id="name")
            yield Static(_machine(), id="machine")
        with Horizontal(id="body"):
            yield Choices(id="choices")
            yield Details()
        yield WhileAway(id="news")
        yield Static(id="said")
        yield KeyBar(cast(list[Binding], self.BINDINGS))

    def on_mount(self) -> None:
        self.query_one("#choices").border_title = Content.styled("profiles and runs", "bold")
        self.set_interval(REFRESH_SECONDS, self._refresh_if_shown)
        self.action_refresh()

    # What there is, read in threads

    def _refresh_if_shown(self) -> None:
        if self.is_current and not self._busy and time.monotonic() >= self._refresh_at:
            self._read_lists()

    def action_refresh(self) -> None:
        """Reads all again; the runs are ordered anew."""
        self._order, self._detailed = [], ""
        self._plans.clear()  # a run may have shown how long its steps take
        self._read_lists()

    @work(thread=True, exclusive=True, group="lists", exit_on_error=False)
    def _read_lists(self) -> None:
        began, until, since = time.monotonic(), time.time(), self._dismissed_until
        profiles, runs = list_profiles(), list_runs(self._session.runs_folder)
        news = while_away(self._session.runs_folder, since)
        self._refresh_at = began + (time.monotonic() - began) / REFRESH_SHARE
        if not get_current_worker().is_cancelled:
            self.app.call_from_thread(self._show_lists, profiles, runs)
            self.app.call_from_thread(self._show_news, news, since, until)

    def _show_lists(self, profiles: list[ProfileFile], runs: list[RunSummary]) -> None:
        """Takes the lists. Runs keep their places, new ones come first."""
        place = {name: index for index, name in enumerate(self._order)}
        runs = sorted(runs, key=lambda run: place.get(run.name, -1))
        before, self._order = self._runs, [run.name for run in runs]
        self._profiles = {f"profile:{profile.name}": profile for profile in profiles}
        self._runs = {f"run:{run.name}": run for run in runs}
        self.query_one(Choices).show(profiles, runs)
        name = self._highlighted
        if not self._detailed or (name in before and self._runs.get(name) != before[name]):
            self._detail(name)

    # What happened while nobody was here

    def _show_news(self, news: list[News], since: float, until: float) -> None:
        if since == self._dismissed_until:  # else it was dismissed meanwhile
            self.query_one(WhileAway).show(news)
            self.told_until = until

    def action_dismiss_news(self) -> None:
        if self.told_until is not None and self.query_one(WhileAway).display:
            self._dismissed_until = self.told_until
            self.query_one(WhileAway).show([])
            self._remember(self.told_until)

    @work(thread=True, group="news", exit_on_error=False)
    def _remember(self, moment: float) -> None:
        remember_look(self._session.runs_folder, moment=moment)

    def on_option_list_option_highlighted(self, event: OptionList.OptionHighlighted) -> None:
        event.stop()
        if event.option_id != self._detailed:  # else the list was only written again
            self._say("")
            self._detail(event.option_id or "")

    def _detail(self, name: str) -> None:
        """Tells of a profile or run; of the one that is shown already, only what is new."""
        details, again = self.query_one(Details), name == self._detailed
        self._detailed = name
        if profile := self._profiles.get(name):
            if not again:
                details.show_profile(profile.name, profile.description, None)
                details.show_plan(self._plans.get(profile.name))
            self._name_choice("Start ")
            self._read_profile(profile)
        elif run := self._runs.get(name):
            if not again:
                details.show_run(run, "", None)
            self._name_choice("Watch " if _trains(run) else "Resume")
            self._read_run(run)

    @work(thread=True, exclusive=True, group="details", exit_on_error=False)
    def _read_profile(self, file: ProfileFile) -> None:
        profile: Profile | None = None
        problem = ""
        try:
            profile = load_profile(str(file.path))
        except UserError as error:
            problem = str(error)
        if not get_current_worker().is_cancelled:
            self.app.call_from_thread(self._show_profile, file, profile, problem)

    def _show_profile(self, file: ProfileFile, profile: Profile | None, problem: str) -> None:
        self.query_one(Details).show_profile(file.name, "" if problem else file.description, profile)
        if problem:
            self._say(problem, "$error")
        elif file.name not in self._plans:
            self._plan(file)

    @work(thread=True, exclusive=True, group="plan", exit_on_error=False)
    def _plan(self, file: ProfileFile, measured: bool = False) -> None:
        """In a thread: plans a profile that stays highlighted for a moment."""
        given_up = lambda: get_current_worker().is_cancelled  # noqa: E731
        time.sleep(0 if measured else _PLAN_AFTER_SECONDS)
        if given_up():
            return
        try:
            table = ask_for_plan(file.path, self._session.runs_folder, measured=measured, given_up=given_up)
        except UserError as error:
            if not given_up():
                self.app.call_from_thread(self._say, str(error), "$error")
            return
        if table is not None and not given_up():
            self.app.call_from_thread(self._show_plan, file, table)

    def _show_plan(self, file: ProfileFile, table: Table) -> None:
        self._plans[file.name] = table
        if self._highlighted == f"profile:{file.name}":
            self._say("")
            self.query_one(Details).show_plan(table)

    @work(thread=True, exclusive=True, group="details", exit_on_error=False)
    def _read_run(self, run: RunSummary) -> None:
        directory = RunDirectory(run.path)
        try:
            if run.state == DAMAGED:
                directory.summary()  # says what is wrong
            attempts = directory.attempts()
            series = {name: Series.of(*directory.curve(name)) for name in CURVES}
        except UserError as error:
            self.app.call_from_thread(self._say, str(error), "$error")
            return
        reason = attempts[-1].reason if attempts and State(attempts[-1].state).final else ""
        if not get_current_worker().is_cancelled:
            self.app.call_from_thread(self.query_one(Details).show_run, run, reason, series)

    # What can be done

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        event.stop()
        self.action_choose()

    def action_choose(self) -> None:
        """Starts the highlighted profile, goes on with the highlighted run, or watches it where it is live."""
        self._choose(self._session.start, self._session.resume, "")

    def action_background(self) -> None:
        """The same in a process of its own, which is watched."""

        def watched(background: Background) -> Client:
            return RemoteClient(background.run)

        start, resume = self._session.start_in_background, self._session.resume_in_background
        self._choose(lambda name: watched(start(name)), lambda name: watched(resume(name)), " in the background")

    def action_measure(self) -> None:
        """Plans the highlighted profile from real steps."""
        if profile := self._profiles.get(self._highlighted):
            self._say(f"taking a few steps of {profile.name} with random tokens…")
            self._plan(profile, measured=True)

    @property
    def _highlighted(self) -> str:
        return self.query_one(Choices).chosen

    def _choose(self, start: Callable[[str], Client], resume: Callable[[str], Client], where: str) -> None:
        """Asked twice, it is done once."""
        if self._busy:
            return
        name = self._highlighted
        if profile := self._profiles.get(name):
            self._start(f"starting {profile.name}{where}…", lambda: start(str(profile.path)))
        elif run := self._runs.get(name):
            if _trains(run):
                self._start(f"looking for {run.name}…", lambda: self._watch(run, resume))
            elif run.state == State.FINISHED:
                self._say(f"{run.name} is finished; to hear it: retention-tui generate {run.name} -p TEXT")
            else:
                self._start(f"resuming {run.name}{where}…", lambda: resume(str(run.path)))

    def _watch(self, run: RunSummary, resume: Callable[[str], Client]) -> Client:
        """Of a run that has stopped, whoever has it may only show that: it is resumed, or that is refused in words."""
        try:
            return RemoteClient(RunDirectory(run.path))
        except UserError:
            if not State(run.state).final:
                raise
            return resume(str(run.path))

    def _start(self, said: str, start: Callable[[], Client]) -> None:
        self._busy = True
        self._say(said)
        self._show_run(start)

    @work
    async def _show_run(self, start: Callable[[], Client]) -> None:
        try:
            client = await asyncio.to_thread(start)
        except UserError as error:
            self._say(str(error), "$error")
        else:
            if self._quitting:
                self._session.stop("stopped on request")
                client.close()
            else:
                self._say("")
                self.action_dismiss_news()
                self._run_shown = client.run.name
                screen = RunScreen(client, home=True, move=self._session.move_to_background)
                self.app.push_screen(screen, self._back)
        finally:
            self._end_work()

    def _back(self, _: None) -> None:
        """The run that was shown has ended, if it was of this process: its lock goes back. What was shown of it is no
        news. The lists are read again."""
        self._busy = True
        self._settle()

    @work
    async def _settle(self) -> None:
        await asyncio.to_thread(self._session.finish)
        await asyncio.to_thread(remember_look, self._session.runs_folder, self._run_shown)
        self._session.client = self._session.ended = None  # its end was seen; nothing of it is told again
        self.action_refresh()
        self._end_work()

    def _end_work(self) -> None:
        self._busy = False
        if self._quitting:
            self.app.exit()

    def action_help(self) -> None:
        self.app.push_screen(Help(self.active_bindings.values()))

    def action_quit(self) -> None:
        """Leaves the app; a run that is just being started is stopped first."""
        if self._busy:
            self._quitting = True
            self._say("quitting…")
        else:
            self.app.exit()

    def _say(self, text: str, colour: str = FAINT) -> None:
        self.query_one("#said", Static).update(Content.styled(wording.printable(" ".join(text.split())), colour))

    def _name_choice(self, name: str) -> None:
        self.query_one(KeyBar).show_state(renamed={"choose": name}, disabled=set())


def _trains(run: RunSummary) -> bool:
    """Whether another process is at it. One that was stopped and is live may just be loading again."""
    return run.live and run.state not in (DAMAGED, State.FINISHED)


def _machine() -> Content:
    system = {"Darwin": "macOS"}.get(platform.system(), platform.system())
    memory = f"{psutil.virtual_memory().total / 1e9:.0f} GB"
    return Content.styled(f"{system} · {os.cpu_count()} cores · {memory}", FAINT)
