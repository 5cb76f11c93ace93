"""Growth by part; what does not count as growth; and the time left until the limit."""

import pytest
from tests.core.memory.traces import MB, report, sample
from tests.core.policies import memory_policy, run_policy

from mlx_supervisor.core import events as ev
from mlx_supervisor.core.machine.run_state import Run
from mlx_supervisor.core.memory.breaker import Breaker
from mlx_supervisor.core.memory.growth import Growth
from mlx_supervisor.daemon.step_line import step_line

LIMIT_MB = 100_000


def _breaker(limit_mb: float = LIMIT_MB) -> Breaker:
    breaker = Breaker(memory_policy(int(limit_mb * MB)), 20)
    breaker.begin_generation()
    return breaker


def _fed(breaker: Breaker, steps: range, start_mb: float = 1000, **growing_mb: float) -> Growth:
    """Growth per step of `arrays`, `cache`, `native` and `children`, in MB."""
    for step in steps:
        held = {name: mb * (step - steps[0]) for name, mb in growing_mb.items()}
        footprint = start_mb + sum(held.values())
        active, cache = 500 + held.get("arrays", 0), 200 + held.get("cache", 0)
        breaker.sample(sample(footprint, held.get("children", 0) + 50))
        breaker.step(report(step, active, cache), False)
    return breaker.growth


@pytest.mark.parametrize("cause", ["arrays", "native", "children"])
def test_the_growing_part_is_named(cause: str) -> None:
    growth = _fed(_breaker(), range(300), **{cause: 10})
    assert growth.verdict
    assert growth.by_cause[cause] == pytest.approx(10 * MB, rel=0.02)
    assert {name for name, slope in growth.by_cause.items() if slope} == {cause}
    assert growth.bytes_per_step == pytest.approx(10 * MB, rel=0.02)


def test_two_leaks_are_added_up() -> None:
    growth = _fed(_breaker(), range(300), arrays=10, native=5)
    assert growth.bytes_per_step == pytest.approx(15 * MB, rel=0.02)


def test_a_growing_cache_is_shown_but_is_no_leak() -> None:
    growth = _fed(_breaker(), range(300), cache=10)
    assert growth.by_cause["cache"] == pytest.approx(10 * MB, rel=0.02)
    assert not growth.verdict
    assert growth.bytes_per_step == 0


def test_steps_and_seconds_left() -> None:
    growth = _fed(_breaker(10_000), range(300), native=10)
    room = 10_000 - (1000 + 10 * 299)
    assert growth.steps_left == pytest.approx(room / 10, abs=2)
    assert growth.seconds_left == pytest.approx(room / 10 * 0.3, abs=1)


def test_steps_left_count_from_the_usual_spikes() -> None:
    breaker = _breaker(10_000)
    _fed(breaker, range(250), native=10)
    breaker.phase(ev.Phase.EVAL)
    breaker.sample(sample(1000 + 2490 + 1000))
    breaker.phase(ev.Phase.TRAIN)
    growth = _fed(breaker, range(250, 300), 3500, native=10)
    assert growth.steps_left == pytest.approx((10_000 - 1000 - 1000 - 10 * 299) / 10, abs=5)


def test_one_slow_step_does_not_stretch_the_time_left() -> None:
    breaker = _breaker(10_000)
    before = _fed(breaker, range(300), native=10).seconds_left
    breaker.step(report(300, 500, 200, seconds=60.0), False)
    assert breaker.growth.seconds_left == pytest.approx(before, rel=0.1)


def test_growth_is_unknown_at_first_and_zero_later() -> None:
    breaker = _breaker()
    assert breaker.growth == Growth()
    assert breaker.growth.bytes_per_step is None
    growth = _fed(breaker, range(300))
    assert (growth.bytes_per_step, growth.verdict, growth.steps_left, growth.seconds_left) == (0, False, None, None)


@pytest.mark.parametrize("phase", [ev.Phase.EVAL, ev.Phase.CHECKPOINT, ev.Phase.LOAD])
def test_other_phases_don_t_count_for_the_floor(phase: ev.Phase) -> None:
    """Evaluations that grow, between steps that do not."""
    breaker = _breaker()
    for step in range(600):
        if step % 10 == 9:
            breaker.phase(phase)
            breaker.sample(sample(1000 + 20 * step))
            breaker.phase(ev.Phase.TRAIN)
        else:
            breaker.sample(sample(1000))
        breaker.step(report(step, 500, 200), False)
        assert not breaker.leaking
    assert breaker.growth.bytes_per_step == 0


def test_an_evaluation_long_ago_is_still_held_in_reserve() -> None:
    """It recurs every 2,000 steps: a leak must trip while there is still room for it."""
    breaker = _breaker(10_000)
    _fed(breaker, range(100))
    breaker.phase(ev.Phase.EVAL)
    breaker.sample(sample(6000))
    breaker.phase(ev.Phase.TRAIN)
    _fed(breaker, range(100, 1000))
    trip_mb = None
    for step in range(1000, 1500):
        footprint = 1000 + 20 * (step - 1000)
        breaker.sample(sample(footprint, 50))
        if breaker.step(report(step, 500, 200), False):
            trip_mb = footprint
            break
    assert trip_mb is not None
    assert trip_mb + 5000 < 10_000


def test_a_lost_end_of_an_evaluation_does_not_hide_a_leak() -> None:
    breaker = _breaker()
    _fed(breaker, range(5))
    breaker.phase(ev.Phase.EVAL)
    assert _fed(breaker, range(5, 300), native=10).verdict


def test_evaluations_without_a_reported_end_do_not_count() -> None:
    breaker = _breaker()
    for step in range(300):
        breaker.phase(ev.Phase.EVAL)
        breaker.sample(sample(1000 + 20 * step))
        breaker.step(report(step, 500, 200), False)
        assert not breaker.leaking


def test_longer_sequences_are_no_leak() -> None:
    """A curriculum: four times the tokens over 120 steps, and memory with them."""
    for curriculum, leaks in ((True, False), (False, True)):
        breaker, seen = _breaker(), False
        for step in range(900):
            longer = 1 + 3 * min(max(step - 400, 0) / 120, 1)
            breaker.sample(sample(1000 + 400 * longer))
            breaker.step(
                report(step, 300 + 400 * longer, 200, tokens=int(1000 * longer) if curriculum else 1000), False
            )
            seen = seen or breaker.leaking
        assert seen is leaks


def test_another_batch_size_is_judged_afresh() -> None:
    """A larger batch needs more memory: no leak."""
    breaker = _breaker()
    _fed(breaker, range(300))
    for step in range(300, 600):
        mb = 1000 if step < 302 else 1000 + min(step - 302, 40) * 25
        breaker.sample(sample(mb))
        breaker.step(report(step, mb - 500, 200, batch=16), False)
        assert not breaker.leaking


def test_lost_steps_and_lost_samples_do_not_bend_the_slope() -> None:
    breaker = _breaker()
    for step in range(900):
        mb = 1000 + 10 * step
        if step % 3:
            breaker.sample(sample(mb))
        if step % 5 > 1:
            breaker.step(report(step, 500, 200), False)
    assert breaker.growth.bytes_per_step == pytest.approx(10 * MB, rel=0.02)


def test_the_same_step_twice_and_an_older_one_are_ignored() -> None:
    breaker = _breaker()
    for step in range(300):
        for again in (step, step, max(step - 3, 0)):
            breaker.sample(sample(1000 + 10 * step))
            breaker.step(report(again, 500, 200), False)
    assert breaker.growth.bytes_per_step == pytest.approx(10 * MB, rel=0.05)


def test_arrays_in_device_memory_do_not_hide_a_leak_of_the_host() -> None:
    """CUDA: MLX's counters exceed the host's memory, and shrink while that grows."""
    breaker = _breaker()
    for step in range(300):
        breaker.sample(sample(1000 + 10 * step))
        breaker.step(report(step, 20_000, 10_000 - 30 * step), False)
    growth = breaker.growth
    assert growth.verdict
    assert growth.by_cause["native"] == pytest.approx(10 * MB, rel=0.02)


def test_a_verdict_is_revoked_when_memory_is_freed() -> None:
    breaker = _breaker()
    assert _fed(breaker, range(300), native=10).verdict
    assert not _fed(breaker, range(300, 303), 1000).verdict


def test_growth_in_the_warm_up_is_a_leak_only_when_the_limit_is_near() -> None:
    for limit_mb, leaks in ((LIMIT_MB, False), (3000, True)):
        breaker = _breaker(limit_mb)
        assert _fed(breaker, range(30), native=30).verdict is leaks
        assert breaker.growth.bytes_per_step == pytest.approx(30 * MB, rel=0.02)


def test_the_step_line_shows_growth_once_there_is_some() -> None:
    machine = Run(run_policy(memory_policy(int(LIMIT_MB * MB))))
    assert "leak" not in step_line(machine, report(1))
    _fed(machine.breaker, range(300))
    assert machine.breaker.growth.bytes_per_step == 0
    assert "leak" not in step_line(machine, report(300))
    machine.breaker.begin_generation()
    _fed(machine.breaker, range(700), arrays=0.3)
    assert "leak=0.3 MiB/step" in step_line(machine, report(700))
