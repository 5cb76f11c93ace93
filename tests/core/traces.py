"""Memory of made-up training runs, from a seed: MiB at the end of every step, and the samples on the way there."""

import math
import random
from collections.abc import Iterator


def healthy(seed: int, steps: int = 600) -> Iterator[float]:
    """Footprint less cache: warm-up, wander, noise, evaluation every 100 steps, a checkpoint every 25."""
    chance = random.Random(seed)
    base, warm, pace = chance.uniform(1000, 4000), chance.uniform(100, 800), chance.uniform(5, 40)
    wander, sigma = 0.0, chance.uniform(2, 15)
    for step in range(steps):
        wander = 0.97 * wander + chance.gauss(0, 3)
        spike = chance.uniform(100, 600) if step % 100 == 99 or step % 25 == 24 else 0.0
        yield base + warm * (1 - math.exp(-step / pace)) + wander + spike + chance.gauss(0, sigma)


def leaking(seed: int, slope_mib: float, onset: int = 0, steps: int = 600) -> Iterator[float]:
    """The same with a leak from `onset` on, of uneven portions."""
    chance = random.Random(seed + 1)
    leaked = 0.0
    for step, mib in enumerate(healthy(seed, steps)):
        if step >= onset:
            leaked += slope_mib * chance.gammavariate(4, 0.25)
        yield mib + leaked


def founding(seed: int, slope_mib: float, steps: int = 80) -> Iterator[list[float]]:
    """Base 500 MiB and so much a step from the first; six samples a step (20 Hz), spikes of up to 60 MiB within it."""
    chance = random.Random(seed)
    sigma = chance.uniform(5, 20)
    for step in range(1, steps + 1):
        held = 500 + slope_mib * step
        yield [held + chance.uniform(0, 60) + chance.gauss(0, sigma) for _ in range(6)]
