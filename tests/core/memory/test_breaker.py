"""The breaker: when it trips, hard or soft, and when it closes."""

from dataclasses import replace

import pytest
from tests.core.memory.traces import founding, healthy
from tests.core.policies import memory_policy

from mlx_supervisor.core import events as ev
from mlx_supervisor.core.diagnosis.causes import Cause
from mlx_supervisor.core.memory.breaker import Breaker, BreakerState, Trip
from mlx_supervisor.core.policy import MIB

LIMIT_MIB = 2200


def _breaker(limit_mib: float = LIMIT_MIB, close_after_steps: int = 20) -> Breaker:
    breaker = Breaker(memory_policy(int(limit_mib * MIB)), close_after_steps)
    breaker.begin_generation()
    return breaker


def _sample(mib: float, children_mib: float = 0) -> ev.Sample:
    return ev.Sample(0.0, 1, int(mib * MIB), 64_000 * MIB, 1, int(children_mib * MIB))


def _report(step: int, cache_mib: float = 0, active_mib: float = 0, seconds: float = 0.3) -> ev.StepReport:
    active, cache = int(active_mib * MIB), int(cache_mib * MIB)
    return ev.StepReport(0.0, 1, step, 1.0, 1, 1, 1e-4, seconds, 1, 1, active, cache)


def _step(breaker: Breaker, step: int, mib: float, cache_mib: float = 0, at_minimum: bool = False) -> Trip | None:
    return breaker.sample(_sample(mib)) or breaker.step(_report(step, cache_mib), at_minimum)


def _founding(seed: int, slope_mib: float, checkpoint_s: float) -> float:
    """Steps between the trip and the limit; 0 for a hard one."""
    breaker = _breaker()
    breaker.checkpoint(checkpoint_s)
    for step, samples in enumerate(founding(seed, slope_mib), start=1):
        if any(breaker.sample(_sample(mib)) for mib in samples):
            return 0
        trip = breaker.step(_report(step), False)
        if trip is not None:
            assert trip.cause is Cause.LEAK
            return (LIMIT_MIB - 500) / slope_mib - step
    return 0


@pytest.mark.parametrize(("slope_mib", "checkpoint_s"), [(20, 0.0), (50, 0.0), (50, 0.6), (100, 0.0)])
def test_a_leak_from_the_first_step_on_trips_in_time(slope_mib: float, checkpoint_s: float) -> None:
    """At least two steps and the time of a checkpoint before the limit."""
    leads = [_founding(seed, slope_mib, checkpoint_s) for seed in range(100)]
    assert sum(lead >= 2 + checkpoint_s / 0.3 for lead in leads) >= 99


def test_a_trip_does_not_come_much_too_early() -> None:
    assert max(_founding(seed, 50, 0.0) for seed in range(50)) < 12


def test_a_healthy_run_with_room_never_trips() -> None:
    for seed in range(10):
        trace = list(healthy(seed))
        breaker = _breaker(1.5 * max(trace))
        assert [trip for step, mib in enumerate(trace) if (trip := _step(breaker, step, mib))] == []


def test_two_consecutive_samples_over_the_limit_trip_hard() -> None:
    breaker = _breaker()
    assert breaker.sample(_sample(LIMIT_MIB + 1)) is None
    assert breaker.sample(_sample(LIMIT_MIB)) is None
    assert breaker.sample(_sample(LIMIT_MIB + 1)) is None
    trip = breaker.sample(_sample(LIMIT_MIB + 1))
    assert trip is not None
    assert trip.cause is Cause.PRESSURE


def test_usual_spikes_count_before_they_cross_the_limit() -> None:
    """A low floor does not help if every tenth step needs much more."""
    breaker = _breaker()
    trips = [_step(breaker, step, 1500 + (660 if step % 10 == 5 else 0)) for step in range(40)]
    assert any(trip is not None and trip.cause is Cause.PRESSURE for trip in trips)


def test_spikes_of_the_first_steps_do_not_count() -> None:
    breaker = _breaker()
    trips = [_step(breaker, step, 2190 if step in (1, 2) else 1000) for step in range(60)]
    assert trips == [None] * 60


def test_evaluation_at_the_smallest_batch_does_not_trip() -> None:
    breaker = _breaker()
    trips = [_step(breaker, step, 2180 if step % 50 == 49 else 1500, at_minimum=True) for step in range(400)]
    assert trips == [None] * 400


def test_a_large_cache_is_cleared_first() -> None:
    for cache_mib, relievable in ((0, False), (900, True)):
        breaker = _breaker()
        trips = [trip for step in range(12) if (trip := _step(breaker, step, 2180, cache_mib))]
        assert [trip.relievable for trip in trips[:1]] == [relievable]


def test_a_cache_that_fills_the_room_is_no_leak() -> None:
    breaker = _breaker()
    trips = [trip for step in range(100) if (trip := _step(breaker, step, 600 + 20 * step, 20 * step))]
    assert (trips[0].cause, trips[0].relievable) == (Cause.PRESSURE, True)


def test_a_leak_leaves_room_for_a_spike_larger_than_those_before() -> None:
    breaker = _breaker()
    for step in range(400):
        mib = 1000 + 10 * max(step - 300, 0) + (400 if step % 10 == 5 else 0)
        trip = _step(breaker, step, mib)
        if trip is not None:
            break
    assert trip is not None
    assert trip.cause is Cause.LEAK
    assert 1000 + 10 * (step - 300) + 1.4 * 400 <= LIMIT_MIB


def test_a_hard_trip_during_fast_growth_is_a_leak() -> None:
    breaker = _breaker(20_000)
    for step in range(30):
        _step(breaker, step, 500 + 50 * step)
    assert not breaker.leaking
    breaker.sample(_sample(20_001))
    trip = breaker.sample(_sample(20_001))
    assert trip is not None
    assert trip.cause is Cause.LEAK


def test_clearing_comes_early_enough_for_a_checkpoint_after_it() -> None:
    breaker = _breaker()
    trips = [
        (2200 - 500 - 20 * step, trip) for step in range(90) if (trip := _step(breaker, step, 500 + 20 * step, 900))
    ]
    room_mib, trip = trips[0]
    assert trip.relievable
    wait_steps = memory_policy(1).relief_wait_s / 0.3
    assert room_mib / 20 >= wait_steps + 2


def test_a_leak_is_not_forgotten_when_the_caches_are_cleared() -> None:
    """Otherwise it would take 18 steps to find it again: 900 MiB at 50 MiB/step."""
    breaker = _breaker()
    for step in range(18):
        _step(breaker, step, 500 + 50 * step)
    assert breaker.leaking
    assert breaker.relieved(1000 * MIB)
    trips = [_step(breaker, step, 500 + 50 * step) for step in range(18, 35)]
    assert [trip.cause for trip in trips if trip][:1] == [Cause.LEAK]


def test_too_little_relief_does_not_count() -> None:
    breaker = _breaker()
    assert not breaker.relieved(2100 * MIB)
    assert breaker.relieved(1900 * MIB)


def test_closed_open_half_open_closed() -> None:
    breaker = _breaker(close_after_steps=5)
    seen = [str(breaker.state)]
    breaker.open()
    assert [_step(breaker, step, 500) for step in range(9)] == [None] * 9
    seen.append(breaker.state)
    breaker.begin_generation()
    for step in range(6):
        _step(breaker, step, 500)
        seen.append(breaker.state)
    assert seen == ["closed", "open"] + ["half-open"] * 4 + ["closed"] * 2
    breaker.begin_generation()
    assert breaker.state is BreakerState.CLOSED


def test_steps_without_a_sample_are_not_judged_by_the_last_one() -> None:
    breaker = _breaker()
    breaker.sample(_sample(2190))
    assert [breaker.step(_report(step), False) for step in range(50)] == [None] * 50


def _grow_at_once(breaker: Breaker, mib_of: dict[int, float], steps: int) -> list[Trip]:
    """`steps` steps at each micro-batch of `mib_of`, whose footprint is constant."""
    trips, number = list[Trip | None](), 0
    for size, mib in mib_of.items():
        for _ in range(steps):
            number += 1
            trips.append(breaker.sample(_sample(mib)))
            trips.append(breaker.step(replace(_report(number), batch_size=size), False))
    return [trip for trip in trips if trip is not None]


def test_the_step_up_to_a_larger_micro_batch_is_not_a_spike() -> None:
    """From 134 to 257 MiB is the larger batch's need: there are no spikes of 123 MiB on top of it."""
    assert _grow_at_once(_breaker(limit_mib=370), {2: 134, 4: 181, 8: 257}, 30) == []


def test_an_evaluation_s_peak_still_counts_after_growth() -> None:
    breaker = _breaker(limit_mib=400)
    assert _grow_at_once(breaker, {2: 134}, 30) == []
    breaker.phase(ev.Phase.EVAL)
    breaker.sample(_sample(395))
    breaker.phase(ev.Phase.TRAIN)
    [trip, *_] = _grow_at_once(breaker, {4: 181}, 30)
    assert "395 MiB" in trip.text
