"""Memory of simulated training runs, from a seed, in MB (10^6 bytes)."""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field

from tests.core.policies import memory_policy

from mlx_supervisor.core import events as ev
from mlx_supervisor.core.memory.breaker import Breaker, Trip

MB = 1e6
STEP_S = 0.3


@dataclass
class Trace:
    """What a step's end looks like from outside (`footprint`) and inside; `excursions`: evaluations before a step.

    `peak_mb`: the peak without the leak.
    """

    footprint: list[float] = field(default_factory=list)
    cache: list[float] = field(default_factory=list)
    active: list[float] = field(default_factory=list)
    excursions: dict[int, float] = field(default_factory=dict)
    onset: int = 0
    leak_mb: float = 0.0
    peak_mb: float = 0.0

    def crossing(self, limit_mb: float) -> int | None:
        """The first step whose end, or the evaluation before it, is over the limit."""
        pairs = enumerate(self.footprint)
        return next((i for i, mb in pairs if max(mb, self.excursions.get(i, 0.0)) >= limit_mb), None)


def training(seed: int, leak_mb: float = 0.0, onset: int = 0, steps: int = 1200, *, native: bool = False) -> Trace:
    """A run of varied lengths: warm-up, a cache that fills and is cleared, wander, fragments, evaluations, checkpoints.

    The leak is in MLX's arrays, or in native memory that they don't show, and comes in uneven portions.
    """
    world, chance = _World(random.Random(seed)), random.Random(seed + 1)
    trace, leaked = Trace(onset=onset, leak_mb=leak_mb), 0.0
    for step in range(steps):
        active, cache, other, excursion = world.step(step)
        trace.peak_mb = max(trace.peak_mb, active + cache + other, excursion)
        if leak_mb and step >= onset:
            leaked += leak_mb * chance.gammavariate(4, 0.25)
        if excursion:
            trace.excursions[step] = excursion + leaked
        trace.footprint.append(active + cache + other + leaked)
        trace.cache.append(cache)
        trace.active.append(active if native else active + leaked)
    return trace


class _World:
    """The healthy part. Every size is drawn once a run, every step from the run's own generator."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        draw = chance.uniform
        self.base, self.warm, self.pace = draw(800, 5000), draw(100, 1200), draw(5, 60)
        self.slow, self.slow_pace = draw(0, 150), draw(80, 250)
        self.length_mb, self.cap, self.skew = draw(20, 250), draw(200, 2500), draw(0, 0.02)
        self.wander_mb, self.noise_mb = draw(2, 25), draw(1, 12)
        self.rise, self.evaluate, self.save = draw(200, 1500), chance.randint(80, 250), chance.randint(30, 90)
        self.save_mb = draw(100, 800)
        self.cache = self.wander = self.fragments = 0.0

    def step(self, step: int) -> tuple[float, float, float, float]:
        """Active, cache, all else, and the peak of an evaluation before this step (0: none)."""
        chance = self.chance
        length = min(chance.lognormvariate(0, 0.6), 6.0)
        self.cache += chance.expovariate(0.1) * max(0.0, 1 - self.cache / self.cap)
        if chance.random() < 0.005:
            self.cache *= chance.uniform(0.1, 0.6)
        self.wander = 0.96 * self.wander + chance.gauss(0, 0.28 * self.wander_mb)
        if chance.random() < 0.0007:
            self.fragments += min(300.0, chance.lognormvariate(3.5, 0.8)) * chance.choice((1, 1, -1))
        grown = self.warm * (1 - math.exp(-step / self.pace)) + self.slow * (1 - math.exp(-step / self.slow_pace))
        active = self.base + 0.7 * grown + self.length_mb * length * 0.3
        other = 0.3 * grown + self.wander + self.fragments + abs(chance.gauss(0, self.noise_mb))
        other += self.cache * chance.gauss(0, self.skew)
        other += self.save_mb * chance.uniform(0.8, 1.2) if step and step % self.save == 0 else 0.0
        held = active + other + self.cache
        excursion = held + self.rise * chance.uniform(0.8, 1.2) if step and step % self.evaluate == 0 else 0.0
        return active, self.cache, other, excursion


@dataclass
class Replay:
    """The step of the first trip, the steps with a verdict, and the slope at the first of those."""

    soft_step: int | None = None
    hard_step: int | None = None
    trip: Trip | None = None
    verdicts: list[int] = field(default_factory=list)
    slope_mb: float | None = None


def replay(trace: Trace, limit_mb: float, *, to_the_trip: bool = True, step_s: float = STEP_S) -> Replay:
    """Feed a breaker with the trace. `to_the_trip`: stop at the first trip; else ignore trips."""
    breaker, seen = Breaker(memory_policy(int(limit_mb * MB)), 20), Replay()
    breaker.begin_generation()
    for step, footprint in enumerate(trace.footprint):
        excursion = trace.excursions.get(step)
        trip = None
        if excursion is not None:
            breaker.phase(ev.Phase.EVAL)
            trip = breaker.sample(sample(excursion))
            breaker.phase(ev.Phase.TRAIN)
        trip = hard = breaker.sample(sample(footprint)) or trip
        if trip is None:
            trip = breaker.step(report(step, trace.active[step], trace.cache[step], step_s), False)
        if trip is not None and seen.trip is None:
            seen.trip = trip
            seen.soft_step, seen.hard_step = (None, step) if hard else (step, None)
        if trip is not None and to_the_trip:
            return seen
        if breaker.leaking:
            seen.verdicts.append(step)
            if seen.slope_mb is None and step >= trace.onset:
                seen.slope_mb = (breaker.growth.bytes_per_step or 0.0) / MB
    return seen


def sample(footprint_mb: float, children_mb: float = 0.0) -> ev.Sample:
    """A memory sample."""
    return ev.Sample(0.0, 1, int(footprint_mb * MB), 10**12, 1, int(children_mb * MB))


def report(
    step: int, active_mb: float = 0.0, cache_mb: float = 0.0, seconds: float = STEP_S, tokens: int = 100, batch: int = 8
) -> ev.StepReport:
    """A step report of the worker."""
    active, cache = int(active_mb * MB), int(cache_mb * MB)
    return ev.StepReport(0.0, 1, step, 1.0, tokens, batch, 1e-4, seconds, batch, 1, active, cache)


def healthy(seed: int, steps: int = 600) -> Iterator[float]:
    """Footprint less cache: warm-up, wander, noise, evaluation every 100 steps, a checkpoint every 25."""
    chance = random.Random(seed)
    base, warm, pace = chance.uniform(1000, 4000), chance.uniform(100, 800), chance.uniform(5, 40)
    wander, sigma = 0.0, chance.uniform(2, 15)
    for step in range(steps):
        wander = 0.97 * wander + chance.gauss(0, 3)
        spike = chance.uniform(100, 600) if step % 100 == 99 or step % 25 == 24 else 0.0
        yield base + warm * (1 - math.exp(-step / pace)) + wander + spike + chance.gauss(0, sigma)


def leaking(seed: int, slope_mb: float, onset: int = 0, steps: int = 600) -> Iterator[float]:
    """The same with a leak from `onset` on, of uneven portions."""
    chance = random.Random(seed + 1)
    leaked = 0.0
    for step, mb in enumerate(healthy(seed, steps)):
        if step >= onset:
            leaked += slope_mb * chance.gammavariate(4, 0.25)
        yield mb + leaked


def founding(seed: int, slope_mb: float, steps: int = 80) -> Iterator[list[float]]:
    """500 MB and `slope_mb` per step from the first; six samples per step (20 Hz), spikes of up to 60 MB."""
    chance = random.Random(seed)
    sigma = chance.uniform(5, 20)
    for step in range(1, steps + 1):
        held = 500 + slope_mb * step
        yield [held + chance.uniform(0, 60) + chance.gauss(0, sigma) for _ in range(6)]
