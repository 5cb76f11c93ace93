"""The breaker on simulated runs, some seeds of each; bench/leak_traces.py measures it on many."""

from functools import cache
from statistics import median

import pytest
from tests.core.memory.traces import Trace, replay, training

NO_LIMIT_MB = 1e7
NULL_SEEDS = range(40)
LEAK_SEEDS = range(1000, 1012)
DELAYS = {0.5: 450, 1.0: 280, 5.0: 60, 50.0: 30, 100.0: 30}
"""Median steps until a leak of so many MB per step must be found."""


@cache
def _healthy(seed: int) -> Trace:
    return training(seed)


@pytest.mark.parametrize("leak_mb", DELAYS)
def test_a_leak_and_its_slope_are_recognised_in_time(leak_mb: float) -> None:
    delays, slopes = [], []
    for seed in LEAK_SEEDS:
        trace = training(seed, leak_mb, 400 + seed % 200, 500 + seed % 200 + DELAYS[leak_mb])
        seen = replay(trace, NO_LIMIT_MB, to_the_trip=False)
        delays.append(next((step - trace.onset + 1 for step in seen.verdicts if step >= trace.onset), 10_000))
        if seen.slope_mb is not None:
            slopes.append(seen.slope_mb)
    assert median(delays) <= DELAYS[leak_mb]
    assert median(abs(slope - leak_mb) / leak_mb for slope in slopes) <= 0.3


def test_a_healthy_run_with_half_as_much_again_never_trips() -> None:
    for seed in NULL_SEEDS:
        trace = _healthy(seed)
        assert replay(trace, 1.5 * trace.peak_mb).trip is None, f"seed {seed}"


def test_a_healthy_run_with_a_quarter_more_hardly_ever_does() -> None:
    trips = sum(replay(trace, 1.25 * trace.peak_mb).trip is not None for trace in map(_healthy, NULL_SEEDS))
    assert trips <= 1


def test_false_verdicts_on_healthy_runs_are_rare() -> None:
    """Native memory does wander and fragment: some rises are a leak by any measure until they end."""
    found = [seed for seed in NULL_SEEDS if replay(_healthy(seed), NO_LIMIT_MB, to_the_trip=False).verdicts]
    assert len(found) <= 2


@pytest.mark.parametrize("headroom", [1.25, 1.5])
@pytest.mark.parametrize("onset", [0, 450])
def test_trips_come_ahead_of_the_limit(headroom: float, onset: int) -> None:
    late = crossings = 0
    for leak_mb in (5.0, 50.0, 100.0):
        for seed in LEAK_SEEDS:
            trace = training(seed, leak_mb, onset, onset + int(4000 / leak_mb) + 50)
            crossing = trace.crossing(headroom * trace.peak_mb)
            if crossing is not None:
                crossings += 1
                trip = replay(trace, headroom * trace.peak_mb).soft_step
                late += trip is None or crossing - trip < 3
    assert crossings >= 20
    assert late <= 0.1 * crossings
