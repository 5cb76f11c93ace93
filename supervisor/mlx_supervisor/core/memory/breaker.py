"""The memory circuit breaker: what each sample and step means for it.

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
from mlx_supervisor.core.policy import MIB, MemoryPolicy

HORIZON_STEPS = (4, 50)
"""Least and most steps before a projected crossing at which a leak trips the breaker."""
ALARM_STEPS = 100
"""In the warm-up, growth that would pass the limit within so many steps is called a leak."""
SPIKE_MARGIN = 0.4
"""Of the largest spike seen: what a projection holds in reserve beyond it."""


class BreakerState(StrEnum):
    """Of the breaker, not of the run."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"


@dataclass(frozen=True, slots=True)
class Trip:
    """Why the breaker opens. `hard`: there is no time to ask."""

    hard: bool
    cause: Cause
    text: str
    relievable: bool = False


class Breaker:
    """Judges one life of a worker at a time; `begin_generation` starts the next."""

    def __init__(self, policy: MemoryPolicy, close_after_steps: int) -> None:
        self._policy = policy
        self._close_after_steps = close_after_steps
        self.state = BreakerState.CLOSED
        self._commit_s = 0.0
        self._forget()

    def _forget(self) -> None:
        self._overrun = Overrun(self._policy.limit_bytes, self._policy.confirm_samples)
        self._level = Level(self._policy.limit_bytes, self._policy.soft_share)
        self._meter = GrowthMeter(self._policy.min_slope_bytes)
        self._healthy_steps = 0
        self._batch_size: int | None = None
        self._cache_bytes = 0
        self._phase = ev.Phase.LOAD
        self._forget_sample()

    def _forget_sample(self) -> None:
        self._last: ev.Sample | None = None
        self._peak_bytes = 0

    def begin_generation(self) -> None:
        """A worker is about to start: half-open after a trip."""
        self._forget()
        if self.state is BreakerState.OPEN:
            self.state = BreakerState.HALF_OPEN

    def open(self) -> None:
        """A trip has been decided."""
        self.state = BreakerState.OPEN

    def phase(self, phase: ev.Phase) -> None:
        """The worker went on to something else, or says that it is still at it."""
        if phase is self._phase:
            return
        if self._phase in (ev.Phase.EVAL, ev.Phase.CHECKPOINT) and self._peak_bytes:
            self._level.add_excursion(self._peak_bytes)
        self._phase = phase
        self._forget_sample()

    def sample(self, sample: ev.Sample) -> Trip | None:
        """A sample from outside: the only thing that can trip hard."""
        self._last = sample
        self._peak_bytes = max(self._peak_bytes, sample.footprint_bytes)
        if not self._overrun.add(sample.footprint_bytes):
            return None
        text = f"{_mib(sample.footprint_bytes)} is over the limit of {_mib(self._policy.limit_bytes)}"
        return Trip(hard=True, cause=self._cause(), text=text)

    def checkpoint(self, seconds: float) -> None:
        """How long a checkpoint takes here: a soft trip must leave time for one."""
        self._commit_s = seconds

    def step(self, report: ev.StepReport, at_minimum: bool) -> Trip | None:
        """The end of a training step. `at_minimum`: the batch can't shrink, so only growth justifies a restart."""
        if self._phase is ev.Phase.LOAD:
            self._phase = ev.Phase.TRAIN
        self.phase(ev.Phase.TRAIN)  # should that word have been lost
        if report.batch_size != self._batch_size:
            self._batch_size = report.batch_size
            self._meter = GrowthMeter(self._policy.min_slope_bytes)
        self._healthy_steps += 1
        if self._last is not None:
            self._level.add(self._last.footprint_bytes, self._peak_bytes)
        self._meter.add(report, self._last)
        self._forget_sample()
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
        patient = min(most, horizon + ceil(self._policy.relief_wait_s / step_s))
        relievable = self._cache_bytes > patient * slope
        if relievable:  # ask early enough to ask for the checkpoint as well, should clearing not help
            horizon = patient
        room = self._room(slope)
        if room > horizon * slope:
            return None
        text = (
            f"memory grows by {slope / MIB:.1f} MiB a step and would pass the limit of "
            f"{_mib(self._policy.limit_bytes)} in {max(room, 0) / slope:.0f} steps"
        )
        return Trip(hard=False, cause=Cause.LEAK, text=text, relievable=relievable)

    def _near(self, at_minimum: bool) -> Trip | None:
        if not self._level.near or (at_minimum and not self._level.grown):
            return None
        text = (
            f"memory with its usual spikes stands at {_mib(self._level.level_bytes)}, "
            f"near the limit of {_mib(self._policy.limit_bytes)}"
        )
        excess = self._level.level_bytes - self._policy.soft_share * self._policy.limit_bytes
        return Trip(hard=False, cause=self._cause(), text=text, relievable=self._cache_bytes > excess)

    def _cause(self) -> Cause:
        """A leak is no fault of the batch size: the run may grow back onto it."""
        return Cause.LEAK if self.leaking or self._meter.pace_bytes is not None else Cause.PRESSURE

    def relieved(self, footprint_bytes: int) -> bool:
        """After the caches were cleared: did that make room? If so, the level is judged afresh."""
        if footprint_bytes > 0.9 * self._policy.soft_share * self._policy.limit_bytes:
            return False
        self._level = Level(self._policy.limit_bytes, self._policy.soft_share)
        self._forget_sample()
        return True

    def _room(self, slope_bytes: float | None = None) -> float:
        """Bytes left for the floor. For one that rises, more is held in reserve: spikes are not always the same, and in
        the warm-up they have not all been seen."""
        limit_bytes = self._policy.limit_bytes
        if slope_bytes is None:
            return limit_bytes - self._level.level_bytes
        share = 1.0 if self._meter.warm else self._policy.soft_share
        return share * limit_bytes - self._level.level_bytes - SPIKE_MARGIN * self._level.jump_bytes(slope_bytes)

    @property
    def growth(self) -> Growth:
        """What grows, and how long the room lasts."""
        meter = self._meter
        slope, by_cause = meter.bytes_per_step, MappingProxyType(dict(meter.by_cause))
        if slope is None or slope <= 0:
            return Growth(slope, by_cause, self.leaking)
        steps_left = max(self._room(), 0.0) / slope
        return Growth(slope, by_cause, self.leaking, steps_left, steps_left * meter.step_s)

    @property
    def leak_bytes_per_step(self) -> float | None:
        """The floor's growth, for display: 0 when it can't be told from noise, None while too little is known."""
        return self._meter.bytes_per_step

    @property
    def leaking(self) -> bool:
        """Whether there is a leak beyond doubt; in the warm-up, growth that would soon pass the limit is one too."""
        pace = self._meter.pace_bytes
        if self._meter.warm or pace is None:
            return self._meter.verdict
        return self._room() < ALARM_STEPS * pace


def _mib(size_bytes: float) -> str:
    return f"{size_bytes / MIB:,.0f} MiB"
