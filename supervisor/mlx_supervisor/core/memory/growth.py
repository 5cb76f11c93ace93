"""What grows in a worker, by cause, and how long the room lasts."""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median
from types import MappingProxyType

from mlx_supervisor.core import events as ev
from mlx_supervisor.core.memory.trend import Scale, Trend

MB = 1e6
ARRAYS_SCALES = (
    Scale(2, 8, 20 * MB, 4),
    Scale(4, 8, 8 * MB, 4),
    Scale(8, 8, 2.5 * MB, 2),
    Scale(20, 8, 0.6 * MB, 2),
    Scale(40, 8, 0.25 * MB, 2),
)
"""For MLX's own counters, which are exact; what varies is the work in hand."""
NATIVE_SCALES = (
    Scale(2, 8, 20 * MB, 3),
    Scale(4, 8, 6 * MB, 3),
    Scale(8, 8, 3 * MB, 3),
    Scale(20, 8, 1 * MB, 3),
    Scale(60, 8, 0.45 * MB, 2),
)
"""For what the operating system says less those: two readings at different times, page cache, fragments."""
CACHE_SCALES = (Scale(8, 8, 2.5 * MB, 2), Scale(40, 8, 0.3 * MB, 2))
EAGER_SCALES = (
    Scale(1, 8, 30 * MB, 2),
    Scale(2, 6, 15 * MB, 2),
    Scale(4, 8, 5 * MB, 3),
    Scale(20, 8, 2 * MB, 1),
    Scale(60, 8, 0.5 * MB, 1),
)
"""For the projection alone, which needs a limit that is near as well. All of these were set on simulated traces
(bench/leak_traces.py has the figures)."""
APART_SAMPLES = 3
"""Samples in a row below MLX's counters: its arrays are elsewhere, on a device with memory of its own."""
STEP_TIMES = 15
LONGER = 1.25
"""Tokens a step, of late over those before: above it, sequences have grown, and memory with them."""
LATE_STEPS, BEFORE_STEPS = 32, 256


@dataclass(frozen=True, slots=True)
class Growth:
    """The floor's growth, in bytes a step.

    `bytes_per_step`: None while too little is known, 0 when it can't be told from noise. `by_cause`: its parts, and
    "cache" besides, each as far as known: "arrays" (MLX's active memory), "cache" (MLX's), "native" (graphs, compiled
    programs, and all else of the leader), "children". `verdict`: a leak beyond doubt. `steps_left`, `seconds_left`:
    until the floor with the usual spikes passes the limit at this pace; None when it does not grow.
    """

    bytes_per_step: float | None = None
    by_cause: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    verdict: bool = False
    steps_left: float | None = None
    seconds_left: float | None = None


class GrowthMeter:
    """Takes the footprint apart and follows each part. One per life of a worker, or batch size of it."""

    def __init__(self, min_slope_bytes: float) -> None:
        self._min_slope_bytes = min_slope_bytes
        self._arrays = Trend(ARRAYS_SCALES, min_slope_bytes)
        self._cache = Trend(CACHE_SCALES, min_slope_bytes)
        self._native = Trend(NATIVE_SCALES, min_slope_bytes)
        self._children: Trend | None = None
        self._total = Trend(EAGER_SCALES, min_slope_bytes, eager=True)
        self._step_s: deque[float] = deque(maxlen=STEP_TIMES)
        self._tokens_late = self._tokens_before = 0.0
        self._below = 0
        self._last_step = -1

    def add(self, report: ev.StepReport, sample: ev.Sample | None) -> None:
        """One training step. `sample`: the last one within it, if there was any. Steps that don't rise are ignored."""
        if report.step <= self._last_step:
            return
        self._last_step = report.step
        self._step_s.append(report.seconds)
        self._count_tokens(report.tokens)
        self._arrays.add(report.step, report.active_bytes)
        self._cache.add(report.step, report.cache_bytes)
        if sample is not None:
            self._add_sample(report, sample)

    def _count_tokens(self, tokens: int) -> None:
        if self._tokens_before == 0:
            self._tokens_late = self._tokens_before = tokens
        self._tokens_late += (tokens - self._tokens_late) / LATE_STEPS
        self._tokens_before += (tokens - self._tokens_before) / BEFORE_STEPS

    def _add_sample(self, report: ev.StepReport, sample: ev.Sample) -> None:
        mlx = report.active_bytes + report.cache_bytes
        self._look_apart(sample.footprint_bytes < mlx)
        leader = sample.footprint_bytes - sample.children_bytes
        self._native.add(report.step, leader if self.apart else leader - mlx)
        self._total.add(report.step, sample.footprint_bytes - (0 if self.apart else report.cache_bytes))
        if sample.children_bytes and self._children is None:
            self._children = Trend(NATIVE_SCALES, self._min_slope_bytes)
        if self._children is not None:
            self._children.add(report.step, sample.children_bytes)

    def _look_apart(self, below: bool) -> None:
        if self.apart:
            return
        self._below = self._below + 1 if below else 0
        if self._below >= APART_SAMPLES:
            self._native = Trend(NATIVE_SCALES, self._min_slope_bytes)
            self._total = Trend(EAGER_SCALES, self._min_slope_bytes, eager=True)

    @property
    def apart(self) -> bool:
        """Whether MLX's arrays are in a memory that the footprint knows nothing of."""
        return self._below >= APART_SAMPLES

    @property
    def warm(self) -> bool:
        """Whether the warm-up is over."""
        return self._total.warm

    @property
    def step_s(self) -> float:
        """Median time of the last steps."""
        return median(self._step_s) if self._step_s else 0.0

    @property
    def pace_bytes(self) -> float | None:
        """Growth of the footprint less the cache, by the quickest judgement; None when there is none to speak of."""
        return self._total.leak_bytes

    @property
    def verdict(self) -> bool:
        """Whether there is a leak beyond doubt. None is found while sequences are growing longer."""
        if self._tokens_late > LONGER * self._tokens_before:
            return False
        return any(trend.leak_bytes is not None for trend in self._parts.values())

    @property
    def by_cause(self) -> Mapping[str, float]:
        """Growth of each part that is known, the cache too."""
        parts = self._parts | {"cache": self._cache}
        return {name: slope for name, trend in parts.items() if (slope := trend.slope_bytes) is not None}

    @property
    def bytes_per_step(self) -> float | None:
        """Growth of all but the cache, of the leaks alone where there are any; None while nothing is known."""
        leaks = [trend.leak_bytes for trend in self._parts.values() if trend.leak_bytes is not None]
        if leaks:
            return sum(leaks)
        slopes = [slope for trend in self._parts.values() if (slope := trend.slope_bytes) is not None]
        return sum(slopes) if slopes else self._total.slope_bytes

    @property
    def _parts(self) -> dict[str, Trend]:
        parts = {"arrays": self._arrays, "native": self._native}
        return parts if self._children is None else parts | {"children": self._children}
