"""The account of a device with its own memory (CUDA): what a run holds of it, against its own limit.

MLX's counters come with every update: the active memory counts, with the highest of the update as its spike. The cache
does not: MLX's allocator frees it before it passes the limit. The driver adds what the counters leave out (the context,
libraries' workspaces), and is read between updates and when the worker is silent.
"""

from collections import deque
from dataclasses import dataclass, replace
from types import MappingProxyType

from mlx_supervisor.core import events as ev
from mlx_supervisor.core.diagnosis.causes import Cause
from mlx_supervisor.core.memory.breaker import Breaker, Trip
from mlx_supervisor.core.memory.device_wait import DeviceWait
from mlx_supervisor.core.memory.growth import EAGER_SCALES, Growth
from mlx_supervisor.core.memory.trend import Trend
from mlx_supervisor.core.policy import MemoryPolicy
from mlx_supervisor.core.words import mebibytes, used_of

OVERHEAD_SAMPLES = 32
"""The lowest difference between driver and counters in this many last samples is what the counters leave out."""
UNCONFIRMED = 2**31
"""The breaker's samples are made from reports of a worker that answers: none of them trips hard."""


@dataclass(frozen=True, slots=True)
class DeviceUse:
    """Who held the device's memory when an allocation failed. `limit_bytes`: this run's."""

    held_bytes: int
    others_bytes: int
    total_bytes: int
    limit_bytes: int

    @property
    def crowded(self) -> bool:
        """Whether other processes held memory that this run's limit counts on."""
        return self.others_bytes > self.total_bytes - self.limit_bytes

    @property
    def text(self) -> str:
        """`this run held 20.0 GiB, other processes held 57.0 GiB of 79.6 GiB`."""
        held, others, total = (_gibibytes(each) for each in (self.held_bytes, self.others_bytes, self.total_bytes))
        return f"this run held {held}, other processes held {others} of {total}"


class DeviceAccount:
    """One per run. Without a device with its own memory `limit_bytes` is 0, and nothing here has an effect."""

    def __init__(self, policy: MemoryPolicy, close_after_steps: int) -> None:
        self._policy = policy
        self._close_after_steps = close_after_steps
        self.limit_bytes = self.total_bytes = 0
        self.free_bytes: int | None = None
        self.wait = DeviceWait()
        self._reset()

    def _reset(self) -> None:
        self.peak_bytes = 0
        self._counted_bytes = self._cache_bytes = 0
        self._overheads: deque[int] = deque(maxlen=OVERHEAD_SAMPLES)
        self._over_steps = self._over_samples = 0
        self._over_since_s: float | None = None
        self._clear_requested_s: float | None = None
        self._driver_bytes: int | None = None
        self._reported_s, self._last_step = float("-inf"), -1
        self._new_breaker()

    def _new_breaker(self) -> None:
        limited = replace(self._policy, limit_bytes=max(self.limit_bytes, 1), confirm_samples=UNCONFIRMED)
        self._breaker = Breaker(limited, self._close_after_steps)
        self._pace = Trend(EAGER_SCALES, self._policy.min_slope_bytes, eager=True)

    # ---- generations

    def begin_generation(self) -> None:
        """A worker is about to start."""
        self.wait.worker_started()
        self._reset()

    def found(self, event: ev.DeviceFound) -> None:
        """The worker named its device."""
        self.total_bytes = event.total_bytes
        self._limit(event.limit_bytes)

    def _limit(self, limit_bytes: int) -> None:
        self.wait.limit_bytes = limit_bytes
        if limit_bytes != self.limit_bytes:
            self.limit_bytes = limit_bytes
            self._new_breaker()

    def phase(self, phase: ev.Phase) -> None:
        """The worker entered a phase."""
        self._breaker.phase(phase)

    def checkpoint(self, seconds: float) -> None:
        """Learn how long a checkpoint takes: a soft trip must leave time for one."""
        self._breaker.checkpoint(seconds)

    # ---- the worker's reports

    def step(self, report: ev.StepReport, at_minimum: bool) -> Trip | None:
        """Judge the end of an update. Its trip is soft: the worker answers, so it can save."""
        if not report.device_limit_bytes:
            return None
        self._limit(report.device_limit_bytes)
        self._note(report)
        overhead_bytes = self.overhead_bytes
        end_bytes = report.active_bytes + overhead_bytes
        peak_bytes = max(report.peak_bytes + overhead_bytes, end_bytes)
        if report.step > self._last_step:  # else a repeated report
            self._last_step = report.step
            self._pace.add(report.step, report.active_bytes)
        for each in (peak_bytes, end_bytes):
            self._breaker.sample(ev.Sample(report.at_s, report.generation, each, 0, 1))
        trip = self._breaker.step(replace(report, cache_bytes=0, process_bytes=0), at_minimum)
        if trip is not None:
            return replace(trip, text=f"device {trip.text}", relievable=False)
        return self._over(end_bytes, peak_bytes, at_minimum)

    def _note(self, report: ev.StepReport) -> None:
        self._reported_s = report.at_s
        self._cache_bytes = report.cache_bytes
        self._counted_bytes = report.active_bytes + report.cache_bytes
        self.peak_bytes = self.wait.need_bytes = max(self.peak_bytes, report.active_bytes + self.overhead_bytes)
        if report.device_free_bytes is not None:
            self.free_bytes = report.device_free_bytes

    def _over(self, end_bytes: int, peak_bytes: int, at_minimum: bool) -> Trip | None:
        """Over the limit already. A peak must be confirmed, and counts only where a smaller micro-batch is left."""
        self._over_steps = self._over_steps + 1 if peak_bytes > self.limit_bytes else 0
        confirmed = self._over_steps >= self._policy.confirm_samples and not at_minimum
        if end_bytes <= self.limit_bytes and not confirmed:
            return None
        used, limit = mebibytes(max(end_bytes, peak_bytes), self.limit_bytes)
        return Trip(self._cause, f"device memory is at {used} MiB, over the limit of {limit} MiB")

    @property
    def _cause(self) -> Cause:
        growing = self.leaking or (self._pace.leak_bytes or 0.0) > 0
        return Cause.LEAK if growing else Cause.PRESSURE

    # ---- the driver's samples

    def sample(self, event: ev.DeviceSample) -> Trip | None:
        """Judge what the driver charges this run. Its trip is hard: the worker may be silent."""
        self.total_bytes, self.free_bytes = event.total_bytes, event.free_bytes
        self._driver_bytes = event.used_bytes
        if event.used_bytes is None or not self.limit_bytes:
            return None
        held_bytes = event.used_bytes - self._cache_bytes
        self.peak_bytes = self.wait.need_bytes = max(self.peak_bytes, held_bytes)
        if self._counted_bytes and event.at_s > self._reported_s:
            self._overheads.append(max(event.used_bytes - self._counted_bytes, 0))
        if event.used_bytes <= self.limit_bytes:
            self._over_since_s, self._over_samples = None, 0
            return None
        self._over_since_s = event.at_s if self._over_since_s is None else self._over_since_s
        self._over_samples = self._over_samples + 1 if held_bytes > self.limit_bytes else 0
        lasting = event.at_s - self._over_since_s > self._policy.relief_wait_s
        if self._over_samples < self._policy.confirm_samples and not lasting:
            return None
        return Trip(self._cause, f"device memory {used_of(event.used_bytes, self.limit_bytes)}")

    def clear_due(self, at_s: float) -> bool:
        """Whether to request that the cache is cleared: with it, the run is over the limit. Once per time allowed."""
        if self._over_since_s is None or self._over_samples:
            return False
        last_s = self._clear_requested_s
        if last_s is not None and at_s - last_s <= self._policy.relief_wait_s:
            return False
        self._clear_requested_s = at_s
        return True

    # ---- figures

    @property
    def overhead_bytes(self) -> int:
        """What the driver charges beyond MLX's counters; 0 while unknown."""
        return min(self._overheads, default=0)

    @property
    def used_bytes(self) -> int:
        """What this run holds of the device now, with the cache: the driver's figure, or else MLX's counters."""
        return self._counted_bytes if self._driver_bytes is None else self._driver_bytes

    @property
    def others_bytes(self) -> int | None:
        """What other processes hold of the device; None while unknown."""
        if self.free_bytes is None or not self.total_bytes:
            return None
        return max(self.total_bytes - self.free_bytes - self.used_bytes, 0)

    @property
    def growth(self) -> Growth:
        """The growth of MLX's arrays on the device, and the time left until the limit."""
        growth = self._breaker.growth
        arrays = {name: part for name, part in growth.by_cause.items() if name == "arrays"}
        slope = growth.bytes_per_step or self._pace.slope_bytes
        if slope:
            arrays.setdefault("arrays", slope)
        return replace(growth, bytes_per_step=slope, by_cause=MappingProxyType(arrays))

    @property
    def leaking(self) -> bool:
        """Whether the device's memory has a confirmed leak."""
        return bool(self.limit_bytes) and self._breaker.leaking

    def use_at_death(self, bye: ev.Bye | None) -> DeviceUse | None:
        """Who held the memory when an allocation failed: as the worker read it then, else as the driver last did."""
        held_bytes, free_bytes = self.used_bytes, self.free_bytes
        if bye is not None and bye.device_free_bytes is not None:
            free_bytes = bye.device_free_bytes
            held_bytes = max((bye.device_held_bytes or 0) + self.overhead_bytes, self._driver_bytes or 0)
        if free_bytes is None or not self.total_bytes or not self.limit_bytes:
            return None
        others_bytes = max(self.total_bytes - free_bytes - held_bytes, 0)
        return DeviceUse(held_bytes, others_bytes, self.total_bytes, self.limit_bytes)


def first_to_limit(device: DeviceAccount, host: Growth) -> Growth:
    """The growth that reaches its limit first, of the machine's memory (`host`) or the device's, with both's parts."""
    if not device.limit_bytes:
        return host
    growth = device.growth
    first = min((growth, host), key=lambda each: (_or_last(each.steps_left), -(each.bytes_per_step or 0.0)))
    parts = MappingProxyType({**host.by_cause, **growth.by_cause})
    return replace(first, by_cause=parts, verdict=host.verdict or growth.verdict)


def _or_last(steps: float | None) -> float:
    return float("inf") if steps is None else steps


def _gibibytes(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.1f} GiB"
