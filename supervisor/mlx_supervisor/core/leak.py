"""Is the floor of the memory rising, and how fast? A slope over block minima, at several scales.

Block minima throw away what comes and goes (evaluation, checkpoints, a long sequence); the Theil-Sen slope (the median
of the slopes of all pairs: Theil 1950, Sen 1968) shrugs off single level shifts. Two gates keep warm-up and a changed
curriculum from looking like a leak: the pairs must agree on the direction, and the rise must not be flattening out.
"""

from collections import deque
from dataclasses import dataclass
from itertools import combinations
from statistics import median

from mlx_supervisor.core.policy import MIB

CONCORDANCE = 0.9
"""Share of pairs of blocks that must rise (a Mann-Kendall test in its simplest form)."""
FLATTENING = 0.5
"""The slope of the newer half must be at least this share of the whole's."""
GRACE_SAMPLES = 4
"""Samples of a life that are ignored: allocation of optimizer state and compilation."""


@dataclass(frozen=True, slots=True)
class Scale:
    """`block` samples give one minimum, `blocks` minima one slope, which counts above `threshold_bytes` a step.

    `confirm` slopes in a row make a verdict.
    """

    block: int
    blocks: int
    threshold_bytes: float
    confirm: int


SCALES = (
    Scale(1, 8, 30 * MIB, 2),
    Scale(2, 6, 15 * MIB, 2),
    Scale(4, 8, 5 * MIB, 3),
    Scale(20, 8, 2 * MIB, 1),
    Scale(60, 8, 0.5 * MIB, 1),
)
"""On simulated healthy traces: 0.3 false verdicts in 10,000 steps after warm-up, no trip at 1.5 times the healthy peak.
Within warm-up memory does rise, and verdicts come and go (about two a life); a verdict alone trips nothing."""


class LeakDetector:
    """Fed with one value a step: footprint less MLX's cache, in bytes. One detector per life of a worker."""

    def __init__(self, min_slope_bytes: float, scales: tuple[Scale, ...] = SCALES) -> None:
        self._scales = [_ScaleState(scale, max(scale.threshold_bytes, min_slope_bytes)) for scale in scales]
        self._samples = 0

    def add(self, step: int, value_bytes: int) -> None:
        """One value at the end of a training step. Steps must rise; values of other phases don't belong here."""
        self._samples += 1
        if self._samples <= GRACE_SAMPLES:
            return
        for scale in self._scales:
            scale.add(step, value_bytes)

    @property
    def verdict_bytes(self) -> float | None:
        """Bytes a step of a leak that is there beyond doubt; None when there is none."""
        verdicts = [scale.slope_bytes for scale in self._scales if scale.confirmed]
        return verdicts[-1] if verdicts else None

    @property
    def slope_bytes(self) -> float | None:
        """The floor's slope in bytes a step by the longest scale that has one, verdict or not (for display)."""
        slopes = [scale.slope_bytes for scale in self._scales if scale.full]
        return slopes[-1] if slopes else None


class _ScaleState:
    def __init__(self, scale: Scale, threshold_bytes: float) -> None:
        self._scale = scale
        self._threshold_bytes = threshold_bytes
        self._minima: deque[tuple[float, int]] = deque(maxlen=scale.blocks)
        self._block: list[tuple[int, int]] = []
        self._hits = 0
        self.slope_bytes = 0.0

    @property
    def full(self) -> bool:
        return len(self._minima) == self._scale.blocks

    @property
    def confirmed(self) -> bool:
        return self._hits >= self._scale.confirm

    def add(self, step: int, value_bytes: int) -> None:
        self._block.append((step, value_bytes))
        if len(self._block) < self._scale.block:
            return
        middle = sum(step for step, _ in self._block) / len(self._block)
        self._minima.append((middle, min(value for _, value in self._block)))
        self._block.clear()
        if self.full:
            self._judge()

    def _judge(self) -> None:
        slopes = _slopes(list(self._minima))
        self.slope_bytes = median(slopes)
        late = median(_slopes(list(self._minima)[self._scale.blocks // 2 :]))
        rising = sum(slope > 0 for slope in slopes) >= CONCORDANCE * len(slopes)
        steady = late >= FLATTENING * self.slope_bytes
        self._hits = self._hits + 1 if rising and steady and self.slope_bytes > self._threshold_bytes else 0


def _slopes(points: list[tuple[float, int]]) -> list[float]:
    return [(v2 - v1) / (s2 - s1) for (s1, v1), (s2, v2) in combinations(points, 2)]
