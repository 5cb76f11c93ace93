"""The growth of a worker's memory, by part, and the time left until the limit."""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median
from types import MappingProxyType

from mlx_supervisor.core import events as ev
from mlx_supervisor.core.memory.step_ends import StepEnds
from mlx_supervisor.core.memory.trend import Scale, Trend

MB = 1e6
ARRAYS_SCALES = (
    Scale(2, 8, 20 * MB, 4),
    Scale(4, 8, 8 * MB, 4),
    Scale(8, 8, 2.5 * MB, 2),
    Scale(20, 8, 0.6 * MB, 2),
    Scale(40, 8, 0.25 * MB, 2),
)
"""For MLX's own counters, which are exact; only the work of a step varies."""
NATIVE_SCALES = (
    Scale(2, 8, 20 * MB, 3),
    Scale(4, 8, 6 * MB, 3),
    Scale(8, 8, 3 * MB, 3),
    Scale(20, 8, 1 * MB, 3),
    Scale(60, 8, 0.45 * MB, 2),
)
"""For the footprint less those counters: readings of different times, page cache, fragmentation."""
CACHE_SCALES = (Scale(8, 8, 2.5 * MB, 2), Scale(40, 8, 0.3 * MB, 2))
EAGER_SCALES = (
    Scale(1, 8, 30 * MB, 2),
    Scale(2, 6, 15 * MB, 2),
    Scale(4, 8, 5 * MB, 3),
    Scale(20, 8, 2 * MB, 1),
    Scale(60, 8, 0.5 * MB, 1),
)
"""For the projection alone, which trips only near the limit. All scales were tuned on simulated traces
(bench/leak_traces.py has the figures), in MB of 10^6 bytes."""
DEVICE_SAMPLES = 3
"""Consecutive samples below MLX's counters: its arrays are on a device with memory of its own."""
BUCKET_S = 0.01
"""Shorter steps are judged together, by the lowest values of at least this long, so that windows and warm-up also span
a time: noise such as a checkpoint being written lasts as long for short steps as for long ones."""
STEP_TIMES = 15
LONGER = 1.25
"""Recent tokens per step over earlier ones: above this ratio, longer sequences explain the growth."""
RECENT_STEPS, EARLIER_STEPS = 32, 256


@dataclass(frozen=True, slots=True)
class Growth:
    """The floor's growth, in bytes per step.

    `bytes_per_step`: None while too little is known, 0 when it is within noise. `by_cause`: the known parts and the
    cache: "arrays" (MLX's active memory), "cache" (MLX's), "native" (graphs, compiled programs, everything else of the
    leader), "children". `verdict`: a confirmed leak. `steps_left`, `seconds_left`: until the floor with the usual
    spikes passes the limit at this pace; None when it does not grow.
    """

    bytes_per_step: float | None = None
    by_cause: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    verdict: bool = False
    steps_left: float | None = None
    seconds_left: float | None = None


class GrowthMeter:
    """Splits the footprint and tracks each part. One per generation and batch size."""

    def __init__(self, min_slope_bytes: float) -> None:
        self._min_slope_bytes = min_slope_bytes
        self._arrays = Trend(ARRAYS_SCALES, min_slope_bytes)
        self._cache = Trend(CACHE_SCALES, min_slope_bytes)
        self._native = Trend(NATIVE_SCALES, min_slope_bytes)
        self._children: Trend | None = None
        self._total = Trend(EAGER_SCALES, min_slope_bytes, eager=True)
        self._ends = StepEnds()
        self._lowest: dict[str, float] = {}
        self._bucket_s = 0.0
        self._step_s: deque[float] = deque(maxlen=STEP_TIMES)
        self._tokens_recent = self._tokens_earlier = 0.0
        self._below = 0
        self._last_step = -1

    def add(self, report: ev.StepReport, sample: ev.Sample | None) -> None:
        """One training step. `sample`: the last one within it, or None. Repeated and older steps are ignored."""
        if report.step <= self._last_step:
            return
        self._last_step = report.step
        self._step_s.append(report.seconds)
        self._count_tokens(report.tokens)
        self._collect(report, sample)
        self._bucket_s += report.seconds
        if self._bucket_s >= BUCKET_S:
            for name, lowest in self._lowest.items():
                self._trend(name).add(report.step, lowest)
            self._lowest, self._bucket_s = {}, 0.0

    def _count_tokens(self, tokens: int) -> None:
        if self._tokens_earlier == 0:
            self._tokens_recent = self._tokens_earlier = tokens
        self._tokens_recent += (tokens - self._tokens_recent) / RECENT_STEPS
        self._tokens_earlier += (tokens - self._tokens_earlier) / EARLIER_STEPS

    def _collect(self, report: ev.StepReport, sample: ev.Sample | None) -> None:
        """Add one step to the bucket: the lowest value of each part counts."""
        mlx = report.active_bytes + report.cache_bytes
        values: dict[str, float] = {"arrays": report.active_bytes, "cache": report.cache_bytes}
        if sample is not None:
            self._detect_device_memory(sample.footprint_bytes < mlx)
        leader = self._ends.leader_bytes(report, sample)
        if leader is not None:
            children = self._ends.children_bytes
            values["native"] = leader if self.on_device else leader - mlx
            values["total"] = leader + children - (0 if self.on_device else report.cache_bytes)
            if children or self._children is not None:
                values["children"] = children
        for name, value in values.items():
            self._lowest[name] = min(value, self._lowest.get(name, value))

    def _trend(self, name: str) -> Trend:
        if name == "children" and self._children is None:
            self._children = Trend(NATIVE_SCALES, self._min_slope_bytes)
        return {"cache": self._cache, "total": self._total, **self._parts}[name]

    def _detect_device_memory(self, below: bool) -> None:
        if self.on_device:
            return
        self._below = self._below + 1 if below else 0
        if self._below >= DEVICE_SAMPLES:
            self._native = Trend(NATIVE_SCALES, self._min_slope_bytes)
            self._total = Trend(EAGER_SCALES, self._min_slope_bytes, eager=True)
            self._lowest.clear()

    @property
    def on_device(self) -> bool:
        """Whether MLX's arrays are in device memory, outside the footprint."""
        return self._below >= DEVICE_SAMPLES

    @property
    def warm(self) -> bool:
        """Whether the warm-up is over."""
        return self._total.warm

    @property
    def step_s(self) -> float:
        """Median duration of the last steps, in seconds."""
        return median(self._step_s) if self._step_s else 0.0

    @property
    def pace_bytes(self) -> float | None:
        """Growth of the footprint less the cache, in bytes per step, by the quick projection; None without any."""
        return self._total.leak_bytes

    @property
    def verdict(self) -> bool:
        """Whether there is a confirmed leak; never while sequences grow longer."""
        if self._tokens_recent > LONGER * self._tokens_earlier:
            return False
        return any(trend.leak_bytes is not None for trend in self._parts.values())

    @property
    def by_cause(self) -> Mapping[str, float]:
        """Growth of each known part and of the cache, in bytes per step."""
        parts = self._parts | {"cache": self._cache}
        return {name: slope for name, trend in parts.items() if (slope := trend.slope_bytes) is not None}

    @property
    def bytes_per_step(self) -> float | None:
        """Growth without the cache: of the leaks alone if there are any; None while nothing is known."""
        leaks = [trend.leak_bytes for trend in self._parts.values() if trend.leak_bytes is not None]
        if leaks:
            return sum(leaks)
        slopes = [slope for trend in self._parts.values() if (slope := trend.slope_bytes) is not None]
        return sum(slopes) if slopes else self._total.slope_bytes

    @property
    def _parts(self) -> dict[str, Trend]:
        parts = {"arrays": self._arrays, "native": self._native}
        return parts if self._children is None else parts | {"children": self._children}
