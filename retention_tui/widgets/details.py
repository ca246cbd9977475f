"""What the launcher tells of the profile or the run that is highlighted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from textual.app import ComposeResult
from textual.containers import Vertical
from textual.content import Content
from textual.widgets import Static

from engine.events import State
from engine.profile import Checkpoint, Profile, RetentionProfile
from engine.report import INTERRUPTED
from engine.runs import DAMAGED
from engine.store import RunSummary
from retention_tui import wording
from retention_tui.history import Series
from retention_tui.kinds import Fact, kind_facts
from retention_tui.plan_view import Table
from retention_tui.theme import FAINT
from retention_tui.widgets.chart import Chart
from retention_tui.widgets.header import STATE_COLOURS
from retention_tui.widgets.monitor import LOSS, legend
from retention_tui.widgets.plan import PlanSummary

CURVES = ("loss", "val_loss")
"""The metrics of a run's chart here."""


class Details(Vertical):
    """A heading, a few facts, and for a run the course of its loss."""

    def compose(self) -> ComposeResult:
        yield Static(id="about")
        yield PlanSummary()
        yield Static(id="facts")
        yield Chart(LOSS)

    def on_mount(self) -> None:
        self.query_one(Chart).display = self.query_one(PlanSummary).display = False

    def show_profile(self, name: str, description: str, profile: Profile | None) -> None:
        """Shows a profile; without `profile`, which may be on its way or wrong, only its description."""
        lines = _table(_profile_facts(profile)) if profile else []
        self._show(name, Content(description), Content("\n").join(lines), None, None)

    def show_plan(self, table: Table | None, said: str = "") -> None:
        """Shows the plan of the profile that is shown, or in its place what is to be said."""
        summary = self.query_one(PlanSummary)
        summary.display = table is not None or bool(said)
        summary.show(table, said)

    def show_run(self, run: RunSummary, reason: str, series: Mapping[str, Series] | None) -> None:
        """Shows a run; `reason` says in words why it is in its state, and may be empty."""
        best = series["val_loss"].least() if series else None
        facts = [
            ("step", f"{run.step:,} of {run.total_steps:,}" if run.total_steps else f"{run.step:,}"),
            ("loss", wording.number(run.loss)),
            ("held-out", wording.number(run.val_loss)),
            ("best held-out", f"{wording.number(best[1])} at {int(best[0]):,}" if best else wording.MISSING),
            ("profile", f"{run.profile}, {run.kind}"),
            ("last written", wording.ago(run.updated)),
        ]
        state = Content.styled(f"● {run.state}", state_colour(run.state))
        heading = Content.assemble(state, (f"  {reason}", FAINT)) if reason else state
        last = max((s.last_step for s in series.values() if len(s)), default=0.0) if series else 0.0
        self.show_plan(None)
        self._show(run.name, heading, Content("\n").join(_table(facts)), series, (0.0, max(last, 1.0)))

    def _show(
        self,
        title: str,
        about: Content,
        facts: Content,
        series: Mapping[str, Series] | None,
        span: tuple[float, float] | None,
    ) -> None:
        self.border_title = Content.styled(title, "bold")
        self.query_one("#about", Static).update(about)
        self.query_one("#facts", Static).update(facts)
        chart = self.query_one(Chart)
        chart.display = series is not None
        if series is not None and span is not None:
            chart.show(series, span)
            chart.set_title(legend(LOSS))


def state_colour(state: str) -> str:
    """The colour of a stored run's state."""
    return {INTERRUPTED: "$warning", DAMAGED: "$error"}.get(state) or STATE_COLOURS[State(state)]


def _profile_facts(profile: Profile) -> list[Fact]:
    train = profile.train
    length = (
        ("steps", f"{train.steps:,}") if train.steps else
        ("epochs", f"{train.epochs:g}") if train.epochs else ("steps", "as many as its tokens need")
    )  # fmt: skip
    full = isinstance(profile, RetentionProfile)  # rows of chats are of any length
    tokens = train.tokens or (train.steps or 0) * train.batch_size * train.sequence_length * full
    micro = f", {train.at_once:,} at once" if train.at_once else ""
    return [
        length,
        *([("tokens", wording.thousands(tokens))] if tokens else []),
        ("effective batch", f"{train.batch_size:,} sequences{micro}"),
        ("sequence length", f"{train.sequence_length:,} tokens"),
        ("learning rate", f"{train.learning_rate:g}, {train.schedule}"),
        ("warm-up", f"{train.warmup_steps:,} steps"),
        *kind_facts(profile),
        ("checkpoint", _how_often(profile.checkpoint)),
    ]


def _how_often(checkpoint: Checkpoint) -> str:
    """`every 15 steps or 30 minutes`."""
    steps = [f"{checkpoint.every:,} steps"] if checkpoint.every else []
    minutes = [f"{checkpoint.every_minutes:g} minutes"] if checkpoint.every_minutes else []
    return f"every {' or '.join(steps + minutes)}" if steps or minutes else "at the end"


def _table(facts: Iterable[Fact]) -> list[Content]:
    return [Content.assemble((f"{name:<17}", FAINT), said) for name, said in facts]
