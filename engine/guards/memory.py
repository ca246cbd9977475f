"""Acts on memory pressure in steps, before the system suffers: cache, micro-batch, pause or stop."""

from __future__ import annotations

from engine.errors import ExitCode
from engine.events import Level, Reading, State
from engine.guards import Action, ClearCache, End, Hold, LetGo, Shrink
from engine.outcome import Outcome
from engine.profile import MemoryGuard as Settings

_GAP_SECONDS = 30.0
"""After a longer silence (the machine slept), or a clock set back, nothing is known to have lasted."""

_RELAPSE_SECONDS = 600.0
"""Held again so soon after it went on, a run waits twice as long as before …"""

_LONGEST_GREEN_SECONDS = 3600.0
"""… but not longer than this."""


class MemoryGuard:
    """Looks at readings of the machine; goes by their own time.

    Pressure that is yellow or worse for `yellow_seconds` clears the cache, and for every further `yellow_seconds`
    halves the micro-batch. Red for `red_seconds` holds or ends the run. After green for `green_seconds` a held run goes
    on, and the next pressure begins with the cache again. A reading without a level changes nothing; green ends all
    that has lasted: so pressure that comes and goes is not acted upon.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._newest: float | None = None
        self._green_since: float | None = None
        self._pressed_since: float | None = None
        self._red_since: float | None = None
        self._cleared = self._overruled = False
        self._let_go_at: float | None = None
        self._green_seconds = settings.green_seconds
        self.holding = False
        """True while the run is held."""

    def overrule(self) -> None:
        """The owner lets a held run go against the guard's advice: it is not held again for the same red."""
        self.holding, self._overruled = False, True

    def judge(self, reading: Reading) -> Action | None:
        """What is to be done now, if anything."""
        if reading.level is None:
            return None
        now, level = reading.time, reading.level
        if self._newest is not None and not 0 <= now - self._newest <= _GAP_SECONDS:
            self._green_since = self._pressed_since = self._red_since = None
        self._newest = now
        self._green_since = _since(self._green_since, now, level is Level.GREEN)
        self._pressed_since = _since(self._pressed_since, now, level is not Level.GREEN)
        self._red_since = _since(self._red_since, now, level is Level.RED)
        self._overruled = self._overruled and level is Level.RED
        if self._green_since is not None:
            return self._calm(now, now - self._green_since)
        if self.holding:
            return None
        if self._red_since is not None and now - self._red_since >= self._settings.red_seconds and not self._overruled:
            return self._yield(reading, now - self._red_since)
        if self._pressed_since is not None and now - self._pressed_since >= self._settings.yellow_seconds:
            return self._ease(reading, now - self._pressed_since)
        return None

    def _calm(self, now: float, lasted: float) -> Action | None:
        if lasted >= self._settings.green_seconds:
            self._cleared = False
        if not self.holding or lasted < self._green_seconds:
            return None
        self.holding, self._let_go_at = False, now
        return LetGo(f"memory pressure has been green for {lasted:.0f} s")

    def _ease(self, reading: Reading, lasted: float) -> Action | None:
        self._pressed_since = reading.time  # the next measure waits as long again
        reason = f"memory pressure was {reading.level} for {lasted:.0f} s{_because(reading)}"
        if not self._cleared or not self._settings.shrink:
            if self._cleared:
                return None
            self._cleared = True
            return ClearCache(reason)
        return Shrink(reason)

    def _yield(self, reading: Reading, lasted: float) -> Action | None:
        reason = f"memory pressure was red for {lasted:.0f} s{_because(reading)}"
        match self._settings.on_red:
            case "pause":
                relapsed = self._let_go_at is not None and 0 <= reading.time - self._let_go_at < _RELAPSE_SECONDS
                longer = min(2 * self._green_seconds, max(_LONGEST_GREEN_SECONDS, self._settings.green_seconds))
                self._green_seconds = longer if relapsed else self._settings.green_seconds
                self.holding = True
                return Hold(reason)
            case "stop":
                return End(Outcome(State.STOPPED, reason, ExitCode.MEMORY))
            case "off":
                return None


def _since(before: float | None, now: float, is_so: bool) -> float | None:
    """When something began that is so now; None where it is not."""
    return (now if before is None else before) if is_so else None


def _because(reading: Reading) -> str:
    return f" ({reading.cause})" if reading.cause else ""
