"""Acts on memory pressure in steps, before the system suffers: cache, micro-batch, pause or stop."""

from __future__ import annotations

from engine.errors import ExitCode
from engine.events import Level, Reading, State
from engine.guards import Action, ClearCache, End, Hold, LetGo, Shrink
from engine.outcome import Outcome
from engine.profile import MemoryGuard as Settings

_GAP_SECONDS = 30.0
"""After a longer silence (the machine slept) nothing is known to have lasted."""


class MemoryGuard:
    """Looks at readings of the machine; goes by their own time.

    Yellow for `yellow_seconds` clears the cache, and for every further `yellow_seconds` halves the micro-batch. Red for
    `red_seconds` holds or ends the run. After green for `green_seconds` a held run goes on, and the next yellow begins
    with the cache again. A reading without a level changes nothing, and one of another level begins its time anew: so
    pressure that comes and goes is not acted upon.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._level: Level | None = None
        self._since = self._newest = 0.0
        self._cleared = False
        self._overruled = False
        self.holding = False
        """True while the run is held."""

    def overrule(self) -> None:
        """The owner lets a held run go against the guard's advice: it is not held again for the same red."""
        self.holding, self._overruled = False, True

    def judge(self, reading: Reading) -> Action | None:
        """What is to be done now, if anything."""
        if reading.level is None:
            return None
        if reading.level is not self._level or reading.time - self._newest > _GAP_SECONDS:
            self._level, self._since = reading.level, reading.time
        self._newest = reading.time
        self._overruled = self._overruled and reading.level is Level.RED
        lasted = reading.time - self._since
        match reading.level:
            case Level.GREEN if lasted >= self._settings.green_seconds:
                return self._calm(reading, lasted)
            case Level.YELLOW if lasted >= self._settings.yellow_seconds and not self.holding:
                return self._ease(reading, lasted)
            case Level.RED if lasted >= self._settings.red_seconds and not (self.holding or self._overruled):
                return self._yield(reading, lasted)
            case _:
                return None

    def _calm(self, reading: Reading, lasted: float) -> Action | None:
        self._cleared = False
        if not self.holding:
            return None
        self.holding = False
        return LetGo(f"memory pressure has been green for {lasted:.0f} s")

    def _ease(self, reading: Reading, lasted: float) -> Action | None:
        self._since = reading.time  # the next measure waits as long again
        reason = f"memory pressure was yellow for {lasted:.0f} s{_because(reading)}"
        if not self._cleared:
            self._cleared = True
            return ClearCache(reason)
        return Shrink(reason) if self._settings.shrink else None

    def _yield(self, reading: Reading, lasted: float) -> Action | None:
        reason = f"memory pressure was red for {lasted:.0f} s{_because(reading)}"
        match self._settings.on_red:
            case "pause":
                self.holding = True
                return Hold(reason)
            case "stop":
                return End(Outcome(State.STOPPED, reason, ExitCode.MEMORY))
            case "off":
                return None


def _because(reading: Reading) -> str:
    return f" ({reading.cause})" if reading.cause else ""
