"""Whether and how fast the floor of a signal rises: slopes over block minima, at several scales.

Block minima remove what comes and goes (an evaluation, a checkpoint, a long sequence, an update already begun). The
Theil-Sen slope (the median of the slopes of all pairs: Theil 1950, Sen 1968) ignores single level shifts. Gates reject
slow wander, warm-up and a changed curriculum; docs/leaks.md explains them.
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
"""First samples of a generation, ignored: allocation of optimizer state and compilation."""
WARM_UP_SAMPLES = 100
"""No verdict before this many samples of a generation: caches, pools and compiled programs still fill up. The windows
of verdicts begin at half of it."""
AVERAGE_BLOCK = 10
AVERAGE_BLOCKS = 31
"""The floor is kept for 30 blocks of 10 samples: growth slower than its average over them is flattening out, even if
a short window disagrees."""
AVERAGE_SHARE = 0.8
"""Minimum slope, as a share of that average."""
CEILING_SAMPLES = 1000
"""A leak raises the floor above its maximum of the last 1,000 to 2,000 samples. Wander does not."""
FASTER = 2.0
"""A shorter window overrides a longer one if its slope is this many times as large."""
RETURN_SAMPLES = 2
"""Consecutive samples that must be back half-way to revoke a verdict."""


@dataclass(frozen=True, slots=True)
class Scale:
    """`block` samples give one minimum, `blocks` minima one slope, which counts above `threshold_bytes` per sample.

    `confirm`: consecutive windows required, each one block later.
    """

    block: int
    blocks: int
    threshold_bytes: float
    confirm: int


class Trend:
    """The trend of one signal, fed with at most one value per step, in bytes. One per generation.

    `leak_bytes` is a verdict, `slope_bytes` any growth beyond noise, both per step. `eager`: for projections, where
    being late costs more than being wrong: warm-up counts too, and earlier maxima are ignored.
    """

    def __init__(self, scales: Iterable[Scale], min_slope_bytes: float = 0.0, *, eager: bool = False) -> None:
        self._eager = eager
        self._windows = [_Window(scale, min_slope_bytes, eager) for scale in scales]
        self._floors: deque[tuple[float, float]] = deque(maxlen=AVERAGE_BLOCKS)
        self._ceiling = _Ceiling()
        self._block = _Block(AVERAGE_BLOCK)
        self._samples = 0

    def add(self, step: int, value_bytes: float) -> None:
        """One value at the end of a training step, never of another phase. Steps must increase."""
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
        """Bytes per step of a confirmed leak; None without one."""
        return _current([window.leak_bytes for window in self._windows])

    @property
    def slope_bytes(self) -> float | None:
        """Bytes per step, leak or warm-up: 0 when within noise, None while too little is known."""
        if not any(window.full for window in self._windows):
            return None
        return _current([window.slope_bytes for window in self._windows]) or 0.0

    @property
    def _average_bytes(self) -> float:
        """The floor's average growth per step over the blocks kept."""
        if len(self._floors) < 2:
            return 0.0
        (first_step, first), (last_step, last) = self._floors[0], self._floors[-1]
        return (last - first) / (last_step - first_step)


class _Block:
    """Collects `size` samples; returns the middle of their steps and their minimum."""

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
    """The recent maximum of the floor. Values older than twice `CEILING_SAMPLES` are dropped."""

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
    """The last blocks of one scale, and their verdict."""

    def __init__(self, scale: Scale, min_slope_bytes: float, eager: bool) -> None:
        self._scale = scale
        self._eager = eager
        self._min_slope_bytes = min_slope_bytes
        self._minima: deque[tuple[float, float]] = deque(maxlen=scale.blocks)
        self._ceiling = _Ceiling()
        self._reset()

    def _reset(self) -> None:
        """Start over, but keep the maximum of the floor."""
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
        """Whether there is a new window to judge."""
        if self.slope_bytes is not None:
            self._returned = self._returned + 1 if value < self._return_bytes else 0
            if self._returned >= RETURN_SAMPLES:
                self._reset()
        minimum = self._block.add(step, value)
        if minimum is None:
            return False
        if self.full:
            self._ceiling.add(self._minima[0][1], self._scale.block)
        self._minima.append(minimum)
        return self.full

    def judge(self, warm: bool, average_bytes: float, ceiling_bytes: float) -> None:
        """Judge the window. `warm`: the warm-up is over. `average_bytes`: growth per step over a longer time."""
        slope = self._rise(ceiling_bytes)
        self._hits = 0 if slope is None else self._hits + 1
        if slope is None:
            if self._eager or not self._still_grows():
                self.leak_bytes = self.slope_bytes = None
        elif self._hits >= self._scale.confirm or self.slope_bytes is not None:
            self.slope_bytes = slope
            self._return_bytes = (self._minima[0][1] + self._minima[-1][1]) / 2
            new = self._hits >= self._scale.confirm and warm and slope >= AVERAGE_SHARE * average_bytes
            if new or self._eager or self.leak_bytes is not None:
                self.leak_bytes = slope

    def _rise(self, ceiling_bytes: float) -> float | None:
        """The slope in bytes per step if it passes all gates, else None."""
        minima = list(self._minima)
        if minima[-1][1] <= minima[0][1] or not self._above_ceiling(minima, ceiling_bytes):
            return None
        rises = [v2 - v1 for (_, v1), (_, v2) in combinations(minima, 2)]
        if sum(rise > 0 for rise in rises) < CONCORDANCE * len(rises):
            return None
        slope = _slope(minima)
        half = self._scale.blocks // 2
        early, late = _slope(minima[:half]), _slope(minima[half:])
        steady = late >= FLATTENING * max(slope, early)
        return slope if steady and slope > self._threshold_bytes else None

    @property
    def _threshold_bytes(self) -> float:
        """Per step. A sample may stand for many steps, and noise is the same however many they are."""
        steps = self._minima[-1][0] - self._minima[0][0]
        samples = self._scale.block * (self._scale.blocks - 1)
        return max(self._scale.threshold_bytes * samples / steps, self._min_slope_bytes)

    def _above_ceiling(self, minima: list[tuple[float, float]], ceiling_bytes: float) -> bool:
        """Whether the floor exceeds its recent maximum. `ceiling_bytes`: the maximum over blocks too long for an
        evaluation to fill; projections use it, and only for shorter blocks."""
        if not self._eager:
            ceiling_bytes = self._ceiling.bytes
        elif self._scale.block >= AVERAGE_BLOCK:
            return True
        return min(minima[-1][1], minima[-2][1]) > ceiling_bytes

    def _still_grows(self) -> bool:
        """Whether growth beyond noise continues, even unevenly."""
        return (
            self.slope_bytes is not None
            and _slope(list(self._minima)[self._scale.blocks // 2 :]) > self._threshold_bytes / 2
        )


def _slope(points: list[tuple[float, float]]) -> float:
    """The Theil-Sen slope."""
    return median([(v2 - v1) / (s2 - s1) for (s1, v1), (s2, v2) in combinations(points, 2)])


def _current(slopes: list[float | None]) -> float | None:
    """The slope of the longest window, which is the most exact, or of a shorter one if growth became much faster."""
    chosen = None
    for slope in reversed(slopes):
        if slope is not None and (chosen is None or slope > FASTER * chosen):
            chosen = slope
    return chosen
