"""Memory of simulated runs whose steps are shorter than the sampling interval, from a seed, in MB (10^6 bytes).

Small models: the noise is that of native memory (arenas that grow by pages, caches of the interpreter, garbage cycles,
checkpoints written beside the training), and much of it follows time, not steps.
"""

import math
import random
from dataclasses import dataclass, field

from tests.core.memory.traces import MB, Replay
from tests.core.policies import memory_policy

from mlx_supervisor.core import events as ev
from mlx_supervisor.core.memory.breaker import Breaker

SAMPLE_S = 0.05
PAGE_MB = 0.004096
OWN_ERROR_MB = 0.3
"""The kernel's counters of a process lag by some pages per core."""


@dataclass
class FastTrace:
    """One row per step: duration, footprint without children, MLX's active memory and cache, and what only lives within
    the step. `evaluations`: seconds and peak of an evaluation before a step. `peak_mb`: without the leak."""

    onset: int = 0
    seconds: list[float] = field(default_factory=list)
    footprint: list[float] = field(default_factory=list)
    active: list[float] = field(default_factory=list)
    cache: list[float] = field(default_factory=list)
    within: list[float] = field(default_factory=list)
    evaluations: dict[int, tuple[float, float]] = field(default_factory=dict)
    peak_mb: float = 0.0


def fast_training(
    seed: int, step_s: float, steps: int, leak_mb: float = 0.0, onset: int = 0, *, native: bool = False
) -> FastTrace:
    """A run of steps of about `step_s`; the leak comes in uneven portions."""
    world, chance = _FastWorld(random.Random(seed), step_s), random.Random(seed + 1)
    trace, leaked = FastTrace(onset), 0.0
    for step in range(steps):
        seconds = step_s * min(chance.lognormvariate(0, 0.2), 4.0)
        active, cache, other, within, evaluation = world.step(step, seconds)
        held = active + cache + other
        trace.peak_mb = max(trace.peak_mb, held + within, evaluation[1])
        if leak_mb and step >= onset:
            leaked += leak_mb * chance.gammavariate(4, 0.25)
        if evaluation[0]:
            trace.evaluations[step] = evaluation[0], evaluation[1] + leaked
        trace.seconds.append(seconds)
        trace.footprint.append(held + leaked)
        trace.active.append(active if native else active + leaked)
        trace.cache.append(cache)
        trace.within.append(within)
    return trace


class _FastWorld:
    """The healthy part. Sizes are relative to the run's base, as a small model's are small."""

    def __init__(self, chance: random.Random, step_s: float) -> None:
        self.chance = chance
        draw = chance.uniform
        self.base = draw(80, 900)
        self.warm, self.pace = draw(0.05, 0.6) * self.base, draw(3, 80)
        self.slow, self.slow_s = draw(0, 0.2) * self.base, draw(0.5, 6.0)
        self.cap, self.fill = draw(0.05, 1.0) * self.base, draw(0.0005, 0.01)
        self.within_mb, self.noise_mb = draw(0.01, 0.2) * self.base, draw(0.1, 2.0)
        self.wander_mb, self.wander_s = draw(0.002, 0.02) * self.base, draw(0.3, 3.0)
        self.arena_mb, self.arena_rate = chance.choice((0.25, 1.0, 8.0, 64.0)), draw(0.2, 2.0)
        self.arena_room = draw(0.02, 0.15) * self.base
        self.garbage_mb, self.garbage_steps = draw(0.0, 0.08) * self.base, chance.choice((0, 70, 400, 700, 3000))
        self.save_s, self.save_every_s, self.save_mb = draw(0.05, 0.6), draw(2, 15), draw(0.05, 0.4) * self.base
        self.evaluate_every = int(draw(4, 30) / step_s)
        self.evaluate_mb = draw(0.1, 0.7) * self.base
        self.cache = self.wander = self.arenas = self.fragments = 0.0
        self.garbage = self.kept_by_evaluation = 0.0
        self.now_s, self.saving_since_s = 0.0, -1e9

    def step(self, step: int, seconds: float) -> tuple[float, float, float, float, tuple[float, float]]:
        """Active, cache, all else, what only lives within the step, and an evaluation's seconds and peak (0: none)."""
        chance = self.chance
        self.now_s += seconds
        self.cache += chance.expovariate(1.0) * self.fill * self.cap * max(0.0, 1 - self.cache / self.cap)
        if chance.random() < 0.0005:
            self.cache *= chance.uniform(0.1, 0.6)
        kept = math.exp(-seconds / self.wander_s)
        self.wander = kept * self.wander + chance.gauss(0, self.wander_mb * math.sqrt(1 - kept * kept))
        if chance.random() < self.arena_rate * seconds and self.arenas < self.arena_room:
            self.arenas += min(self.arena_mb, self.arena_room)
        if chance.random() < 0.002 * seconds * 20:
            self.fragments += min(0.1 * self.base, chance.lognormvariate(1.5, 1.0)) * chance.choice((1, 1, -1))
        if self.garbage_steps:
            self.garbage = self.garbage_mb * (step % self.garbage_steps) / self.garbage_steps
        if self.now_s - self.saving_since_s > self.save_every_s:
            self.saving_since_s = self.now_s
        saved = min((self.now_s - self.saving_since_s) / self.save_s, 1.0)
        saving = self.save_mb * saved if saved < 1.0 else 0.0  # a copy is written while training continues
        grown = self.warm * (1 - math.exp(-step / self.pace)) + self.slow * (1 - math.exp(-self.now_s / self.slow_s))
        active = self.base * 0.5 + 0.6 * grown + 0.5 * saving
        other = self.base * 0.5 + 0.4 * grown + self.wander + self.arenas + self.fragments + self.garbage
        other += 0.5 * saving + self.kept_by_evaluation + abs(chance.gauss(0, self.noise_mb))
        other -= other % PAGE_MB
        evaluation = (0.0, 0.0)
        if step and step % self.evaluate_every == 0:
            if not self.kept_by_evaluation:
                self.kept_by_evaluation = chance.uniform(0, 0.1) * self.base
            peak_mb = active + self.cache + other + self.evaluate_mb * chance.uniform(0.7, 1.2)
            evaluation = chance.uniform(0.1, 2.0), peak_mb
        return active, self.cache, other, self.within_mb * chance.uniform(0.2, 1.0), evaluation


def fast_replay(
    trace: FastTrace, limit_mb: float, *, to_the_trip: bool = True, own: str = "true", seed: int = 1
) -> Replay:
    """Feed a breaker with the trace, sampled every `SAMPLE_S`. `own`: the worker's reading: "true", "stuck", "missing".

    Steps count from 0, and in `Replay` too.
    """
    chance = random.Random(seed)
    breaker, seen = Breaker(memory_policy(int(limit_mb * MB)), 20), Replay()
    breaker.begin_generation()
    now_s, due_s = 0.0, chance.uniform(0, SAMPLE_S)
    before_mb = trace.footprint[0]
    for step, after_mb in enumerate(trace.footprint):
        trip = None
        if step in trace.evaluations:
            seconds, peak_mb = trace.evaluations[step]
            now_s += seconds
            breaker.phase(ev.Phase.EVAL)
            trip = breaker.sample(_sample(peak_mb))
            breaker.phase(ev.Phase.TRAIN)
            due_s = now_s + chance.uniform(0, SAMPLE_S)
        end_s = now_s + trace.seconds[step]
        while due_s < end_s:
            share = (due_s - now_s) / trace.seconds[step]
            held_mb = before_mb + share * (after_mb - before_mb) + chance.random() * trace.within[step]
            trip = breaker.sample(_sample(held_mb)) or trip
            due_s += SAMPLE_S * chance.uniform(0.95, 1.3)
        now_s, before_mb = end_s, after_mb
        hard = trip
        if trip is None:
            trip = breaker.step(_report(trace, step, own, chance), False)
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


def _sample(footprint_mb: float) -> ev.Sample:
    return ev.Sample(0.0, 1, int(footprint_mb * MB), 10**12, 1)


def _report(trace: FastTrace, step: int, own: str, chance: random.Random) -> ev.StepReport:
    reading_mb = {"true": trace.footprint[step] - 30.0, "stuck": 60.0, "missing": 0.0}[own]
    if own == "true":
        reading_mb += chance.uniform(-OWN_ERROR_MB, OWN_ERROR_MB)
    memory = int(trace.active[step] * MB), int(trace.cache[step] * MB)
    return ev.StepReport(
        0.0, 1, step, 1.0, 100, 8, 1e-4, trace.seconds[step], 8, 1, *memory, process_bytes=int(reading_mb * MB)
    )
