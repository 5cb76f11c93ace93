"""The memory circuit breaker: judges every sample and step.

closed → open → half-open → closed. A trip opens it; the restarted worker runs half-open until it has made enough
healthy steps.
"""

from dataclasses import dataclass
from enum import StrEnum
from math import ceil
from types import MappingProxyType

from mlx_supervisor.core import events as ev
from mlx_supervisor.core.diagnosis.causes import Cause
from mlx_supervisor.core.memory.growth import Growth, GrowthMeter
from mlx_supervisor.core.memory.headroom import Level, Overrun
from mlx_supervisor.core.policy import MemoryPolicy
from mlx_supervisor.core.words import counted, growth_rate, mebibytes, size, used_of

HORIZON_STEPS = (4, 50)
"""Minimum and maximum number of steps before the projected crossing at which a leak trips the breaker."""
ALARM_STEPS = 100
"""During warm-up, growth that would pass the limit within this many steps is a leak."""
SPIKE_MARGIN = 0.4
"""Reserve of a projection beyond the largest spike so far, as a share of it."""


class BreakerState(StrEnum):
    """The state of the breaker, not of the run."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"


@dataclass(frozen=True, slots=True)
class Trip:
    """Why the breaker opens. `relievable`: clearing the caches may help."""

    cause: Cause
    text: str
    relievable: bool = False


class Breaker:
    """Judges one generation at a time; `begin_generation` starts the next."""

    def __init__(self, policy: MemoryPolicy, close_after_steps: int) -> None:
        self._policy = policy
        self._close_after_steps = close_after_steps
        self.state = BreakerState.CLOSED
        self._commit_s = 0.0
        self._reset()

    def _reset(self) -> None:
        self._overrun = Overrun(self._policy.limit_bytes, self._policy.confirm_samples)
        self._level = Level(self._policy.limit_bytes, self._policy.soft_share)
        self._meter = GrowthMeter(self._policy.min_slope_bytes)
        self._healthy_steps = 0
        self._batch_size: int | None = None
        self._cache_bytes = 0
        self._phase = ev.Phase.LOAD
        self._reset_sample()

    def _reset_sample(self) -> None:
        self._last: ev.Sample | None = None
        self._peak_bytes = 0

    def begin_generation(self) -> None:
        """A worker is about to start: half-open if a trip ended the last one."""
        self._reset()
        if self.state is BreakerState.OPEN:
            self.state = BreakerState.HALF_OPEN

    def open(self) -> None:
        """Open the breaker after a trip."""
        self.state = BreakerState.OPEN

    def phase(self, phase: ev.Phase) -> None:
        """The worker entered a phase, or reported progress within it."""
        if phase is self._phase:
            return
        if self._phase in (ev.Phase.EVAL, ev.Phase.CHECKPOINT) and self._peak_bytes:
            self._level.add_excursion(self._peak_bytes)
        self._phase = phase
        self._reset_sample()

    def sample(self, sample: ev.Sample) -> Trip | None:
        """Judge a memory sample. Its trip is hard: the worker must be killed at once. A step's trip is soft."""
        self._last = sample
        self._peak_bytes = max(self._peak_bytes, sample.footprint_bytes)
        if not self._overrun.add(sample.footprint_bytes):
            return None
        return Trip(self._cause(), used_of(sample.footprint_bytes, self._policy.limit_bytes))

    def checkpoint(self, seconds: float) -> None:
        """Learn how long a checkpoint takes: a soft trip must leave time for one."""
        self._commit_s = seconds

    def step(self, report: ev.StepReport, at_minimum: bool) -> Trip | None:
        """Judge the end of a step. `at_minimum`: the batch can't shrink, so only growth justifies a restart."""
        if self._phase is ev.Phase.LOAD:
            self._phase = ev.Phase.TRAIN
        self.phase(ev.Phase.TRAIN)  # in case that message was lost
        if report.batch_size != self._batch_size:
            if self._batch_size is not None:  # the step up to a larger micro-batch is not a spike that recurs
                limit_bytes, share = self._policy.limit_bytes, self._policy.soft_share
                self._level = Level(limit_bytes, share, self._level.excursion_bytes)
            self._batch_size = report.batch_size
            self._meter = GrowthMeter(self._policy.min_slope_bytes)
        self._healthy_steps += 1
        if self._last is not None:
            self._level.add(self._last.footprint_bytes, self._peak_bytes)
        self._meter.add(report, self._last)
        self._reset_sample()
        self._cache_bytes = report.cache_bytes
        trip = self._projected() or self._near(at_minimum)
        if trip is None and self.state is BreakerState.HALF_OPEN and self._healthy_steps >= self._close_after_steps:
            self.state = BreakerState.CLOSED
        return trip

    def _projected(self) -> Trip | None:
        slope = self._meter.pace_bytes
        if slope is None:
            return None
        least, most = HORIZON_STEPS
        step_s = max(self._meter.step_s, 1e-3)
        horizon = min(most, least + ceil(2 * self._commit_s / step_s))
        horizon_with_relief = min(most, horizon + ceil(self._policy.relief_wait_s / step_s))
        relievable = self._cache_bytes > horizon_with_relief * slope
        if relievable:  # early enough for a checkpoint if clearing does not help
            horizon = horizon_with_relief
        room = self._room(slope)
        if room > horizon * slope:
            return None
        text = (
            f"memory grows by {growth_rate(slope)} and would pass the limit of "
            f"{size(self._policy.limit_bytes)} in {counted(round(max(room, 0) / slope), 'step')}"
        )
        return Trip(Cause.LEAK, text, relievable)

    def _near(self, at_minimum: bool) -> Trip | None:
        if not self._level.near or (at_minimum and not self._level.grown):
            return None
        level, limit = mebibytes(self._level.level_bytes, self._policy.limit_bytes)
        text = f"memory with usual spikes is at {level} MiB, near the limit of {limit} MiB"
        excess = self._level.level_bytes - self._policy.soft_share * self._policy.limit_bytes
        return Trip(self._cause(), text, relievable=self._cache_bytes > excess)

    def _cause(self) -> Cause:
        """After a leak the run may grow back to its batch size; after pressure it may not."""
        return Cause.LEAK if self.leaking or self._meter.pace_bytes is not None else Cause.PRESSURE

    def relieved(self, footprint_bytes: int) -> bool:
        """Whether clearing the caches made room. If so, the level is judged afresh."""
        if footprint_bytes > 0.9 * self._policy.soft_share * self._policy.limit_bytes:
            return False
        self._level = Level(self._policy.limit_bytes, self._policy.soft_share)
        self._reset_sample()
        return True

    def _room(self, slope_bytes: float | None = None) -> float:
        """Bytes left below the limit for the floor. A rising floor (`slope_bytes` per step) keeps a larger reserve:
        spikes vary, and not all of them occur during warm-up."""
        limit_bytes = self._policy.limit_bytes
        if slope_bytes is None:
            return limit_bytes - self._level.level_bytes
        share = 1.0 if self._meter.warm else self._policy.soft_share
        return share * limit_bytes - self._level.level_bytes - SPIKE_MARGIN * self._level.jump_bytes(slope_bytes)

    @property
    def growth(self) -> Growth:
        """The growth by part, and the time left until the limit."""
        meter = self._meter
        slope, by_cause = meter.bytes_per_step, MappingProxyType(dict(meter.by_cause))
        if slope is None or slope <= 0:
            return Growth(slope, by_cause, self.leaking)
        steps_left = max(self._room(), 0.0) / slope
        return Growth(slope, by_cause, self.leaking, steps_left, steps_left * meter.step_s)

    @property
    def leaking(self) -> bool:
        """Whether there is a confirmed leak, or, during warm-up, growth that would soon pass the limit."""
        pace = self._meter.pace_bytes
        if self._meter.warm or pace is None:
            return self._meter.verdict
        return self._room() < ALARM_STEPS * pace
