"""How often a checkpoint is worth what it costs."""

import math
from collections import deque

MOST_S = 600.0
"""Never longer than this, unless the overhead allowed forbids it: what a kill may cost at most."""
LEAST_S = 5.0
"""Never shorter: what would be won is less than a restart takes, and every write wears the disk."""
FIRST_S = 10.0
"""The first checkpoint of a life, when nothing has been measured yet."""
WRITE_FACTOR = 10.0
"""The writer rests nine times as long as it writes, whatever the formula says."""
_COSTS_KEPT = 8
_UPDATES_KEPT = 64
_UPDATES_NEEDED = 8


def interval_s(cost_s: float, write_s: float, between_failures_s: float, overhead: float) -> float:
    """Seconds from one checkpoint to the next.

    Young's first-order optimum, sqrt(2 x cost x mean time between failures) (J. W. Young, "A first order approximation
    to the optimum checkpoint interval", CACM 17 (9), 1974), bounded as CheckFreq bounds it (Mohan et al., FAST 2021):
    at least `cost_s` / `overhead`, so that checkpoints take at most that share of the time. `cost_s` is what one costs
    training, `write_s` what it takes in all; `overhead` is above 0.
    """
    young_s = math.sqrt(2.0 * cost_s * between_failures_s)
    return max(min(young_s, MOST_S), cost_s / overhead, WRITE_FACTOR * write_s, LEAST_S)


class Measured:
    """The interval from what checkpoints have cost so far in this life, which counts as a time without failure."""

    def __init__(self, overhead: float, between_failures_s: float) -> None:
        self._overhead = overhead
        self._between_failures_s = between_failures_s
        self._costs: deque[tuple[float, float]] = deque(maxlen=_COSTS_KEPT)

    def note(self, cost_s: float, write_s: float) -> None:
        """A checkpoint cost training so much, and took so long in all. A slow-down may have been measured as less
        than nothing: that evens out in the mean."""
        self._costs.append((cost_s, write_s))

    def seconds(self, life_s: float) -> float:
        """The interval now, `life_s` after the start of this life."""
        if not self._costs:
            return FIRST_S
        cost_s = max(sum(cost for cost, _ in self._costs) / len(self._costs), 0.0)
        write_s = sum(write for _, write in self._costs) / len(self._costs)
        return interval_s(cost_s, write_s, max(self._between_failures_s, life_s), self._overhead)


class SlowDown:
    """What writing costs the updates made meanwhile: their time against the mean of those with no write beside them.

    The update before a write counts with those beside it. Updates overlap, but that one is waited for before the next
    begins, so the two share their time unevenly: one looks too short and the other too long.
    """

    def __init__(self) -> None:
        self._calm: deque[float] = deque(maxlen=_UPDATES_KEPT)
        self._before_s: float | None = None
        self._excess_s = 0.0

    def note_update(self, seconds: float, *, writing: bool) -> None:
        """An update took so long, with or without a write beside it."""
        if writing:
            self._count(self._before_s)
            self._count(seconds)
            self._before_s = None
            return
        if self._before_s is not None:
            self._calm.append(self._before_s)
        self._before_s = seconds

    def _count(self, seconds: float | None) -> None:
        if seconds is not None and len(self._calm) >= _UPDATES_NEEDED:
            self._excess_s += seconds - sum(self._calm) / len(self._calm)

    def take_s(self) -> float:
        """The excess since it was last taken, in seconds; below 0 when the updates happened to be faster."""
        excess_s, self._excess_s = self._excess_s, 0.0
        return excess_s
