"""Share out a run's time, so that it ends in time on a machine of any kind.

Each setting has a fair share of the time that is left. The first calls of its implementations may take several times as much,
as compiling does, while repeating them may take the share alone, and less where the run is late. What a setting does not use is
there for those behind it.
"""

import math
import time
from collections.abc import Callable, Hashable

GUARANTEED = 0.75  # A setting leaves to those behind it so much of what they were to have at first.
LATEST = 1 / 3  # A setting is left out where less than this part of that is left.
LATE = 0.25  # The part of a share for repetitions where less is left than that.
GENEROUS = 4.0  # First calls may take so many fair shares. Most settings use less than one.
UNLIMITED_SHARE = 30.0  # Seconds, in a run without a limit. There too nothing is repeated for hours.


class Budget:
    """Tell whether there is time for a call that is expected to take so many seconds. None as ``seconds`` sets no limit."""

    def __init__(self, seconds: float | None = None, clock: Callable[[], float] = time.monotonic):
        self.clock, self.seconds = clock, math.inf if seconds is None else seconds
        self.end = clock() + self.seconds
        self.weights: dict[Hashable, int] = {}
        self.rate, self.kept, self.reached = 0.0, 0.0, True
        self.current: Hashable = None
        self.share, self.most = UNLIMITED_SHARE, GENEROUS * UNLIMITED_SHARE
        self.began, self.repeating = clock(), 0.0

    @property
    def left(self) -> float:
        """Return the seconds that the whole run has left."""
        return self.end - self.clock()

    @property
    def unlimited(self) -> bool:
        return math.isinf(self.seconds)

    def why_not(self, what: str) -> str:
        """Say what there was no time for, and which run has more."""
        more = "" if self.unlimited else " (fastlm bench --full and fastlm bench OP take more)"
        return f"this run had no time for {what}{more}"

    def before(self, seconds: float) -> "Budget":
        """Return the part of this budget that ends so many seconds before its end."""
        return self if self.unlimited else Budget(self.left - seconds, self.clock)

    def plan(self, weights: dict[Hashable, int]) -> None:
        """Expect these settings, each to take time in proportion to its weight."""
        self.weights = dict(weights)
        self.rate = self.left / max(1, sum(weights.values()))  # seconds per weight

    def enter(self, setting: Hashable) -> None:
        """Begin a setting, and so end the one before it. Entering it again changes nothing."""
        if setting == self.current:
            return
        self.weights.pop(self.current, None)
        self.current, self.began, self.repeating = setting, self.clock(), 0.0
        if not self.unlimited:
            weight, total = self.weights.get(setting, 1), max(1, sum(self.weights.values()))
            self.share = max(0.0, self.left * weight / total)
            self.kept = GUARANTEED * self.rate * (total - weight)
            self.reached = self.left > LATEST * self.kept
            self.most = min(GENEROUS * self.share, max(self.share, self.left - self.kept))

    def allows_first(self, needed: bool = False) -> bool:
        """Say whether another implementation may be called. In a setting that is left out none may, and else what is needed."""
        spent = self.clock() - self.began
        return self.left > 0 and self.reached and (needed or spent <= self.most)

    def allows_second(self, seconds: float, needed: bool = False) -> bool:
        """Say whether an implementation whose first call took so many seconds may be called again, to be timed.

        How long others or a check took is no reason to do without a call that takes little.
        """
        return seconds <= min(self.left, GENEROUS * self.share if needed else self.most)

    def allows_repeating(self, seconds: float) -> bool:
        """Say whether a call that took so many seconds may be repeated; they count as spent."""
        late = self.left < self.kept
        if self.repeating + seconds > min(self.left, self.share * (LATE if late else 1.0)):
            return False
        self.repeating += seconds
        return True
