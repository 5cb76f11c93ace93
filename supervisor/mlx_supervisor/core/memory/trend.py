"""Is the floor of a signal rising, and how fast? A slope over block minima, at several scales.

Block minima throw away what comes and goes (an evaluation, a checkpoint, a long sequence, an update that has already
begun); the Theil-Sen slope (the median of the slopes of all pairs: Theil 1950, Sen 1968) shrugs off single level
shifts. Gates keep wander, warm-up and a changed curriculum from looking like a leak; docs/leaks.md tells them in words.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations
from statistics import median

CONCORDANCE = 0.9
"""Share of pairs of blocks that must rise (a Mann-Kendall test in its simplest form)."""
FLATTENING = 0.5
"""The slope of the newer half must be at least this share of the whole's and of the older half's."""
GRACE_SAMPLES = 4
"""Samples of a life that are ignored: allocation of optimizer state and compilation."""
WARM_UP_SAMPLES = 100
"""No verdict before so many samples of a life: caches, pools and compiled programs are still filling up. The windows
that verdicts come from begin at half of it."""
AVERAGE_BLOCK = 10
AVERAGE_BLOCKS = 31
"""The floor is remembered for 30 blocks of 10 samples: growth that is slower now than its average over them is
flattening out, whatever a short window says."""
AVERAGE_SHARE = 0.8
"""The slope must be at least this share of that average."""
CEILING_SAMPLES = 1000
"""A leak brings the floor where it has not been for so many samples, or twice as many. Wander does not."""
FASTER = 2.0
"""A shorter window is believed over a longer one when its slope is so many times as large."""
RETURN_SAMPLES = 2
"""Samples in a row that must have returned half-way for a verdict to be revoked."""


@dataclass(frozen=True, slots=True)
class Scale:
    """`block` samples give one minimum, `blocks` minima one slope, which counts above `threshold_bytes` a step.

    `confirm`: windows in a row, each a block further on.
    """

    block: int
    blocks: int
    threshold_bytes: float
    confirm: int


class Trend:
    """The trend of one signal, fed with at most one value a step, in bytes. One per life of a worker.

    `leak_bytes` is a verdict, `slope_bytes` what can be told from noise, both per step. `eager`: for projections, where
    being late costs more than being wrong; warm-up counts as well, and there is no memory of earlier heights.
    """

    def __init__(self, scales: Iterable[Scale], min_slope_bytes: float = 0.0, *, eager: bool = False) -> None:
        self._eager = eager
        self._windows = [_Window(scale, max(scale.threshold_bytes, min_slope_bytes), eager) for scale in scales]
        self._floors: deque[tuple[float, float]] = deque(maxlen=AVERAGE_BLOCKS)
        self._ceiling = _Ceiling()
        self._block = _Block(AVERAGE_BLOCK)
        self._samples = 0

    def add(self, step: int, value_bytes: float) -> None:
        """One value at the end of a training step. Steps must rise; values of other phases don't belong here."""
        self._samples += 1
        if self._samples <= GRACE_SAMPLES:
            return
        floor = self._block.add(step, value_bytes)
        if floor is not None:
            self._floors.append(floor)
            self._ceiling.add(floor[1], AVERAGE_BLOCK)
        if not self._eager and self._samples <= WARM_UP_SAMPLES // 2:
            return
        for window in self._windows:
            if window.add(step, value_bytes):
                window.judge(self.warm, self._average_bytes, self._ceiling.bytes)

    @property
    def warm(self) -> bool:
        """Whether the warm-up is over."""
        return self._samples >= WARM_UP_SAMPLES

    @property
    def leak_bytes(self) -> float | None:
        """Bytes a step of a leak that is there beyond doubt; None when there is none."""
        return _current([window.leak_bytes for window in self._windows])

    @property
    def slope_bytes(self) -> float | None:
        """Bytes a step, leak or warm-up: 0 when it can't be told from noise, None while too little is known."""
        if not any(window.full for window in self._windows):
            return None
        slope = _current([window.slope_bytes for window in self._windows])
        return 0.0 if slope is None else slope

    @property
    def _average_bytes(self) -> float:
        """The floor's growth per step over the time that is remembered."""
        if len(self._floors) < 2:
            return 0.0
        (first_step, first), (last_step, last) = self._floors[0], self._floors[-1]
        return (last - first) / (last_step - first_step)


class _Block:
    """Collects `size` samples; gives the middle of their steps and the lowest of their values."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._count = 0
        self._first_step = 0
        self._lowest = 0.0

    def add(self, step: int, value: float) -> tuple[float, float] | None:
        if self._count == 0:
            self._first_step, self._lowest = step, value
        elif value < self._lowest:
            self._lowest = value
        self._count += 1
        if self._count < self._size:
            return None
        self._count = 0
        return (self._first_step + step) / 2, self._lowest


class _Ceiling:
    """The highest floor of late. What is twice `CEILING_SAMPLES` old is forgotten: a peak hides no leak for good."""

    def __init__(self) -> None:
        self._older = self._newer = float("-inf")
        self._samples = 0

    def add(self, floor: float, samples: int) -> None:
        self._newer = max(self._newer, floor)
        self._samples += samples
        if self._samples >= CEILING_SAMPLES:
            self._older, self._newer, self._samples = self._newer, float("-inf"), 0

    @property
    def bytes(self) -> float:
        return max(self._older, self._newer)


class _Window:
    """One scale's last blocks, and what follows from them."""

    def __init__(self, scale: Scale, threshold_bytes: float, eager: bool) -> None:
        self._scale = scale
        self._eager = eager
        self._threshold_bytes = threshold_bytes
        self._minima: deque[tuple[float, float]] = deque(maxlen=scale.blocks)
        self._ceiling = _Ceiling()
        self._forget()

    def _forget(self) -> None:
        """Start over, but for where the floor has been."""
        for _, floor in self._minima:
            self._ceiling.add(floor, self._scale.block)
        self._minima.clear()
        self._block = _Block(self._scale.block)
        self._hits = 0
        self._return_bytes = 0.0
        self._returned = 0
        self.leak_bytes: float | None = None
        self.slope_bytes: float | None = None

    @property
    def full(self) -> bool:
        return len(self._minima) == self._scale.blocks

    def add(self, step: int, value: float) -> bool:
        """True when there is something new to judge."""
        if self.slope_bytes is not None:
            self._returned = self._returned + 1 if value < self._return_bytes else 0
            if self._returned >= RETURN_SAMPLES:
                self._forget()
        minimum = self._block.add(step, value)
        if minimum is None:
            return False
        if self.full:
            self._ceiling.add(self._minima[0][1], self._scale.block)
        self._minima.append(minimum)
        return self.full

    def judge(self, warm: bool, average_bytes: float, ceiling_bytes: float) -> None:
        """`warm`: the warm-up is over. `average_bytes`: the growth per step over a longer time."""
        slope = self._rise(ceiling_bytes)
        self._hits = 0 if slope is None else self._hits + 1
        if slope is None:
            if self._eager or not self._goes_on():
                self.leak_bytes = self.slope_bytes = None
        elif self._hits >= self._scale.confirm or self.slope_bytes is not None:
            self.slope_bytes = slope
            self._return_bytes = (self._minima[0][1] + self._minima[-1][1]) / 2
            new = self._hits >= self._scale.confirm and warm and slope >= AVERAGE_SHARE * average_bytes
            if new or self._eager or self.leak_bytes is not None:
                self.leak_bytes = slope

    def _rise(self, ceiling_bytes: float) -> float | None:
        """The slope, if it passes the gates."""
        minima = list(self._minima)
        if minima[-1][1] <= minima[0][1] or not self._climbs(minima, ceiling_bytes):
            return None
        rises = [v2 - v1 for (_, v1), (_, v2) in combinations(minima, 2)]
        if sum(rise > 0 for rise in rises) < CONCORDANCE * len(rises):
            return None
        slope = _slope(minima)
        half = self._scale.blocks // 2
        early, late = _slope(minima[:half]), _slope(minima[half:])
        steady = late >= FLATTENING * max(slope, early)
        return slope if steady and slope > self._threshold_bytes else None

    def _climbs(self, minima: list[tuple[float, float]], ceiling_bytes: float) -> bool:
        """Whether the floor is where it has not been of late. `ceiling_bytes` is of blocks no evaluation can fill: a
        projection goes by it, and needs it for shorter blocks alone."""
        if not self._eager:
            ceiling_bytes = self._ceiling.bytes
        elif self._scale.block >= AVERAGE_BLOCK:
            return True
        return min(minima[-1][1], minima[-2][1]) > ceiling_bytes

    def _goes_on(self) -> bool:
        """Whether growth that was told from noise before still goes on, if unevenly."""
        return (
            self.slope_bytes is not None
            and _slope(list(self._minima)[self._scale.blocks // 2 :]) > self._threshold_bytes / 2
        )


def _slope(points: list[tuple[float, float]]) -> float:
    """Theil-Sen."""
    return median([(v2 - v1) / (s2 - s1) for (s1, v1), (s2, v2) in combinations(points, 2)])


def _current(slopes: list[float | None]) -> float | None:
    """Of the longest window that has one, as the most exact; of a shorter one where growth has become much faster."""
    chosen = None
    for slope in reversed(slopes):
        if slope is not None and (chosen is None or slope > FASTER * chosen):
            chosen = slope
    return chosen
