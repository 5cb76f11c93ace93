"""The automatic interval between checkpoints."""

import math
from collections import deque

LONGEST_S = 600.0
"""Upper bound, unless the allowed overhead needs more: the most that a kill may cost."""
SHORTEST_S = 5.0
"""Lower bound: shorter saves less time than a restart takes, and every write wears the disk."""
FIRST_S = 10.0
"""Until the first checkpoint of a generation, when nothing has been measured yet."""
WRITE_FACTOR = 10.0
"""The writer idles at least nine times as long as it writes."""
_COSTS_KEPT = 8
_UPDATES_KEPT = 64
_UPDATES_NEEDED = 8


def interval_s(cost_s: float, write_s: float, between_failures_s: float, overhead: float) -> float:
    """Seconds from one checkpoint to the next.

    Young's first-order optimum, sqrt(2 x cost x mean time between failures) (J. W. Young, "A first order approximation
    to the optimum checkpoint interval", CACM 17 (9), 1974), bounded as CheckFreq bounds it (Mohan et al., FAST 2021):
    at least `cost_s` / `overhead`, so that checkpoints take at most that share of the time. `cost_s`: training time
    that one checkpoint costs; `write_s`: its whole duration; `overhead` is above 0.
    """
    young_s = math.sqrt(2.0 * cost_s * between_failures_s)
    return max(min(young_s, LONGEST_S), cost_s / overhead, WRITE_FACTOR * write_s, SHORTEST_S)


class MeasuredInterval:
    """The interval from the measured costs of this generation's checkpoints."""

    def __init__(self, overhead: float, between_failures_s: float) -> None:
        self._overhead = overhead
        self._between_failures_s = between_failures_s
        self._costs: deque[tuple[float, float]] = deque(maxlen=_COSTS_KEPT)

    def note(self, cost_s: float, write_s: float) -> None:
        """Record a checkpoint: the training time that it cost, and its whole duration. A noisy slow-down may be
        negative: the mean evens it out."""
        self._costs.append((cost_s, write_s))

    def seconds(self, uptime_s: float) -> float:
        """The interval now. `uptime_s`: age of this generation, a time without failure."""
        if not self._costs:
            return FIRST_S
        cost_s = max(sum(cost for cost, _ in self._costs) / len(self._costs), 0.0)
        write_s = sum(write for _, write in self._costs) / len(self._costs)
        return interval_s(cost_s, write_s, max(self._between_failures_s, uptime_s), self._overhead)


class SlowDown:
    """What a write costs the updates during it: their time minus the mean of undisturbed updates.

    The last update before a write counts as disturbed. Updates overlap, but that one finishes before the next begins,
    so the two split their time unevenly: one measures too short, the other too long.
    """

    def __init__(self) -> None:
        self._undisturbed: deque[float] = deque(maxlen=_UPDATES_KEPT)
        self._before_s: float | None = None
        self._excess_s = 0.0

    def note_update(self, seconds: float, *, writing: bool) -> None:
        """Record an update's time. `writing`: a write ran during it."""
        if writing:
            self._count(self._before_s)
            self._count(seconds)
            self._before_s = None
            return
        if self._before_s is not None:
            self._undisturbed.append(self._before_s)
        self._before_s = seconds

    def _count(self, seconds: float | None) -> None:
        if seconds is not None and len(self._undisturbed) >= _UPDATES_NEEDED:
            self._excess_s += seconds - sum(self._undisturbed) / len(self._undisturbed)

    def take_s(self) -> float:
        """The excess since the last call, in seconds; negative if the updates happened to be faster."""
        excess_s, self._excess_s = self._excess_s, 0.0
        return excess_s
