"""The distance to the limit: single samples over it (hard), and the floor plus the usual spikes (soft)."""

from collections import deque

FLOOR_STEPS = 8
"""The floor is the lowest footprint of this many last steps."""
JUMP_STEPS = 3
"""The same for a floor that rises fast."""
SPIKE_STEPS = 250
"""The largest spike of this many last steps is kept in reserve."""
EXCURSIONS = 4
"""The largest spike of this many last evaluations and checkpoints is kept in reserve, however old they are."""
SETTLING_STEPS = 10
"""Spikes of the first steps of a generation do not count: loading and compilation."""
CONFIRM_STEPS = 2
"""Consecutive steps that must be near the limit."""
GROWN_SHARE = 0.1
"""Share of the limit by which the floor must rise within a generation for a restart to help. Spikes don't count:
evaluations recur in every generation."""


class Overrun:
    """Counts consecutive samples over the limit."""

    def __init__(self, limit_bytes: int, confirm_samples: int) -> None:
        self._limit_bytes = limit_bytes
        self._confirm_samples = confirm_samples
        self._over = 0

    def add(self, footprint_bytes: int) -> bool:
        """Whether this sample confirms that the limit is passed."""
        self._over = self._over + 1 if footprint_bytes > self._limit_bytes else 0
        return self._over >= self._confirm_samples


class Level:
    """The floor of the last steps plus the largest recent spike, in bytes. One per generation and micro-batch.

    `excursion_bytes`: the highest peak of an evaluation or a checkpoint so far. That of a smaller micro-batch is passed
    on to its successor, and counts there until the first peak of its own.
    """

    def __init__(self, limit_bytes: int, soft_share: float, excursion_bytes: int = 0) -> None:
        self.excursion_bytes = excursion_bytes
        self._soft_bytes = soft_share * limit_bytes
        self._grown_bytes = GROWN_SHARE * limit_bytes
        self._ends: deque[int] = deque(maxlen=FLOOR_STEPS)
        self._spikes: deque[int] = deque(maxlen=SPIKE_STEPS)
        self._jumps: deque[int] = deque(maxlen=SPIKE_STEPS)
        self._excursions: deque[int] = deque(maxlen=EXCURSIONS)
        self._steps = 0
        self._near = 0
        self._first_bytes: int | None = None
        self.floor_bytes = 0
        self.spike_bytes = 0

    def add(self, end_bytes: int, peak_bytes: int) -> None:
        """One training step: the footprint at its end, and the highest sampled during it."""
        self._steps += 1
        self._ends.append(end_bytes)
        self.floor_bytes = min(self._ends)
        if self._steps > SETTLING_STEPS:
            self._spikes.append(max(peak_bytes, end_bytes) - self.floor_bytes)
            self._jumps.append(max(peak_bytes, end_bytes) - min(list(self._ends)[-JUMP_STEPS:]))
        excursion_bytes = max(self._excursions, default=self.excursion_bytes - self.floor_bytes)
        self.spike_bytes = max(max(self._spikes, default=0), excursion_bytes, 0)
        if self._steps == SETTLING_STEPS:
            self._first_bytes = self.floor_bytes
        near = self._steps >= FLOOR_STEPS and self.level_bytes > self._soft_bytes
        self._near = self._near + 1 if near else 0

    def jump_bytes(self, slope_bytes: float) -> float:
        """The largest recent rise above the steps before it, less the floor's rise of `slope_bytes` per step."""
        jump = max(self._jumps, default=0) - (JUMP_STEPS - 1) * slope_bytes
        return max(jump, max(self._excursions, default=0), 0.0)

    def add_excursion(self, peak_bytes: int) -> None:
        """Record the peak of an evaluation or a checkpoint: another one will follow."""
        self.excursion_bytes = max(self.excursion_bytes, peak_bytes)
        if self._ends:
            self._excursions.append(max(peak_bytes - self.floor_bytes, 0))

    @property
    def level_bytes(self) -> int:
        """The expected footprint at the next spike."""
        return self.floor_bytes + self.spike_bytes

    @property
    def near(self) -> bool:
        """Whether the limit has been near for `CONFIRM_STEPS`."""
        return self._near >= CONFIRM_STEPS

    @property
    def grown(self) -> bool:
        """Whether the floor rose so much in this generation that a new process would need less."""
        return self._first_bytes is not None and self.floor_bytes - self._first_bytes > self._grown_bytes
