"""The list of the launcher: profiles under the names of their kinds, and runs, each in a line."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import ClassVar

from rich.cells import cell_len
from textual.binding import Binding, BindingType
from textual.content import Content
from textual.events import Click, Resize
from textual.widgets import OptionList
from textual.widgets.option_list import Option

from engine.profile_files import ProfileFile
from engine.store import RunSummary
from retention_tui import wording
from retention_tui.theme import FAINT
from retention_tui.widgets.details import state_colour

CHOOSE = "Start it, resume it, or watch it"
KINDS = {"retention-lm": "language", "lora": "LoRA"}
"""What the kinds of runs are called in the list, in its order; an unknown one is called what it is, and comes last."""
_BESIDE_NAME, _LOSS_WIDTH, _SHORTEST_NAME = 9, 7, 8


class Choices(OptionList):
    """A click shows what it hits; only Enter and a double click choose it, as training is no small thing to start.

    Ids of options are `profile:NAME` and `run:NAME`.
    """

    BINDINGS: ClassVar[list[BindingType]] = [Binding("enter", "select", "Choose", key_display="Enter", tooltip=CHOOSE)]

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id, markup=False)
        self._profiles: Sequence[ProfileFile] = ()
        self._runs: Sequence[RunSummary] = ()

    @property
    def chosen(self) -> str:
        """The id of what is highlighted; empty where nothing is."""
        return self.highlighted_option.id or "" if self.highlighted_option else ""

    def show(self, profiles: Sequence[ProfileFile], runs: Sequence[RunSummary]) -> None:
        """Takes the lists; the highlight stays where it is, and where nothing has changed, nothing is drawn."""
        self._profiles, self._runs = profiles, runs
        self._write()

    def on_resize(self, _: Resize) -> None:
        self.call_after_refresh(self._write)

    async def on_click(self, event: Click) -> None:
        event.prevent_default()
        option = event.style.meta.get("option")
        if option is not None and not self.get_option_at_index(option).disabled:
            self.highlighted = option
            if event.chain == 2:
                self.action_select()

    def _write(self) -> None:
        if not self._profiles:  # not yet read
            return
        highlighted = self.chosen or "profile:demo"
        width = self.scrollable_content_region.width
        options = [*_profile_options(self._profiles), *_run_options(self._runs, width)]
        ids = [option.id for option in options]
        if ids == [option.id for option in self.options]:
            for index, (old, new) in enumerate(zip(self.options, options, strict=True)):
                if old.prompt != new.prompt:
                    self.replace_option_prompt_at_index(index, new.prompt)
            return
        self.clear_options().add_options(options)
        self.highlighted = ids.index(highlighted) if highlighted in ids else next(
            (index for index, option in enumerate(options) if not option.disabled), None
        )  # fmt: skip


def _profile_options(profiles: Sequence[ProfileFile]) -> list[Option]:
    """The profiles under the names of their kinds, the user's own under a heading of their own."""

    def group(profile: ProfileFile) -> str:
        return "your own" if profile.own else KINDS.get(profile.kind, profile.kind)

    def place(profile: ProfileFile) -> tuple[bool, int, str, str]:
        kinds = [*KINDS, profile.kind]
        return profile.own, 0 if profile.own else kinds.index(profile.kind), group(profile), profile.name

    options: list[Option] = []
    for name, members in groupby(sorted(profiles, key=place), key=group):
        options.append(_heading(name, first=not options))
        options += [Option(Content(f"  {profile.name}"), id=f"profile:{profile.name}") for profile in members]
    return options


def _run_options(runs: Sequence[RunSummary], width: int) -> list[Option]:
    """A line for each run, of this width: of a long name only as much as there is room for."""
    options = [_heading("runs")]
    longest = max((cell_len(run.name) for run in runs), default=0)
    with_loss = longest <= width - _BESIDE_NAME - _LOSS_WIDTH
    room = min(longest, max(_SHORTEST_NAME, width - _BESIDE_NAME - (_LOSS_WIDTH if with_loss else 0)))
    for run in runs:
        name = Content(run.name).truncate(room, ellipsis=True)
        done = f"{int(100 * run.step / run.total_steps):>3} %" if run.total_steps else "    –"
        line = Content.assemble(("● ", state_colour(run.state)), name, " " * (room - name.cell_length))
        line += Content.styled(f"  {done}" + (f"  {wording.number(run.loss)}" if with_loss else ""), FAINT)
        options.append(Option(line, id=f"run:{run.name}"))
    return options if runs else [*options, Option(Content.styled("  none yet", FAINT), disabled=True)]


def _heading(name: str, first: bool = False) -> Option:
    return Option(Content.styled(name if first else f"\n{name}", "$foreground 55%"), disabled=True)
