"""The app: it shows a run, or a launcher where there is none. It draws and asks; the engine lives elsewhere."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import ClassVar

from textual.app import App, SystemCommand
from textual.binding import Binding, BindingType
from textual.driver import Driver
from textual.screen import Screen

from retention_tui import theme
from retention_tui.client import Client
from retention_tui.screens.launcher import Launcher
from retention_tui.screens.quit import Question
from retention_tui.screens.run import RunScreen
from retention_tui.session import Session

_WIDGETS = ("chart", "chat", "details", "happening", "header", "keybar", "log", "monitor", "plan", "sampling", "turn")
_SCREENS = ("help", "launcher", "quit", "run", "setting")


class RetentionApp(App[str]):
    """Its result is `detach` where training shall go on without a screen, else None.

    It never waits for the engine: that is done by whoever ran the app, once it has ended.
    """

    TITLE = "retention-tui"
    CSS_PATH = [
        *(f"widgets/{name}.tcss" for name in _WIDGETS),
        *(f"screens/{name}.tcss" for name in _SCREENS),
    ]
    HORIZONTAL_BREAKPOINTS = [(0, "-tiny"), (64, "-narrow"), (100, "-normal"), (126, "-wide")]
    VERTICAL_BREAKPOINTS = [(0, "-flat"), (10, "-short"), (30, "-tall")]
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("ctrl+q,ctrl+c", "quit", "Quit", show=False, system=True),
        Binding(
            "ctrl+l",
            "switch_theme",
            "Light or dark",
            show=False,
            key_display="Ctrl+L",
            tooltip="Switch between light and dark",
        ),
    ]

    def __init__(
        self, session: Session, client: Client | None = None, driver_class: type[Driver] | None = None
    ) -> None:
        super().__init__(driver_class=driver_class)
        self._session, self._client = session, client
        self._launcher: Launcher | None = None
        for look in (theme.DARK, theme.LIGHT):
            self.register_theme(look)
        self.theme = theme.DARK.name
        self.animation_level = "none"

    def get_default_screen(self) -> Screen[None]:
        if self._client is None:
            self._launcher = Launcher(self._session)
            return self._launcher
        return RunScreen(self._client, move=self._session.move_to_background)

    @property
    def told_until(self) -> float | None:
        """Up to when the launcher has told what happened, in seconds since the epoch; None where there is none."""
        return self._launcher.told_until if self._launcher else None

    async def action_quit(self) -> None:
        """Asks as the key q does, on whatever screen; a question that is open already stays."""
        if isinstance(self.screen, RunScreen | Launcher):
            self.screen.action_quit()
        elif not isinstance(self.screen, Question):
            self.screen.dismiss()

    def action_switch_theme(self) -> None:
        self.theme = theme.LIGHT.name if self.current_theme.dark else theme.DARK.name

    def get_system_commands(self, screen: Screen[object]) -> Iterable[SystemCommand]:
        """What the keys do, and a few things more."""
        for node, binding, enabled, _ in screen.active_bindings.values():
            if enabled and binding.tooltip and node in (screen, self):
                ask = partial(self.run_action, binding.action, node)
                yield SystemCommand(binding.description.strip(), binding.tooltip, ask)
        yield SystemCommand("Theme", "Choose another look", self.action_change_theme)
