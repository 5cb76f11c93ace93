"""The leak rule: sees what rises for good, whatever comes and goes on top of it."""

from statistics import median

import pytest
from tests.core.traces import healthy, leaking

from mlx_supervisor.core.leak import LeakDetector
from mlx_supervisor.core.policy import MIB

SEEDS = range(20)


def _first_verdict(seed: int, slope_mib: float, onset: int) -> int | None:
    detector = LeakDetector(0.5 * MIB)
    for step, mib in enumerate(leaking(seed, slope_mib, onset)):
        detector.add(step, int(mib * MIB))
        if step >= onset and detector.verdict_bytes is not None:
            return step - onset
    return None


@pytest.mark.parametrize(("slope_mib", "at_most"), [(5, 90), (50, 20), (100, 15)])
def test_a_leak_is_found_in_time(slope_mib: float, at_most: int) -> None:
    delays = [_first_verdict(seed, slope_mib, 200) for seed in SEEDS]
    found = [delay for delay in delays if delay is not None]
    assert len(found) == len(SEEDS)
    assert median(found) <= at_most


def test_a_healthy_run_is_left_alone_after_warm_up() -> None:
    verdicts = 0
    for seed in SEEDS:
        detector = LeakDetector(0.5 * MIB)
        for step, mib in enumerate(healthy(seed)):
            detector.add(step, int(mib * MIB))
            verdicts += step > 250 and detector.verdict_bytes is not None
    assert verdicts == 0


def test_the_slope_is_measured() -> None:
    detector = LeakDetector(0.5 * MIB)
    for step in range(100):
        detector.add(step, 1000 * MIB + 20 * MIB * step)
    assert detector.verdict_bytes == pytest.approx(20 * MIB, rel=0.01)
    assert detector.slope_bytes == pytest.approx(20 * MIB, rel=0.01)


def test_steps_without_a_sample_do_not_bend_the_slope() -> None:
    detector = LeakDetector(0.5 * MIB)
    for step in range(0, 300, 3):
        detector.add(step, 1000 * MIB + 20 * MIB * step)
    assert detector.verdict_bytes == pytest.approx(20 * MIB, rel=0.01)


def test_one_level_shift_is_no_leak() -> None:
    detector = LeakDetector(0.5 * MIB)
    for step in range(1300):
        detector.add(step, (1000 if step < 300 else 1400) * MIB)
        assert detector.verdict_bytes is None


def test_growth_that_flattens_out_is_no_leak_any_more() -> None:
    detector = LeakDetector(0.5 * MIB)
    for step in range(400):
        detector.add(step, int((2000 - 1000 * 0.93**step) * MIB))
    assert detector.verdict_bytes is None


def test_warm_up_is_told_from_a_leak_while_it_flattens_out() -> None:
    detector = LeakDetector(0.5 * MIB)
    for step in range(180):
        detector.add(step, int((2000 - 1000 * 0.97**step) * MIB))
        assert step < 150 or detector.verdict_bytes is None


def test_a_leak_that_stops_is_forgiven() -> None:
    detector = LeakDetector(0.5 * MIB)
    for step in range(60):
        detector.add(step, 1000 * MIB + 50 * MIB * step)
    assert detector.verdict_bytes is not None
    for step in range(60, 1200):
        detector.add(step, 4000 * MIB)
    assert detector.verdict_bytes is None


def test_leaks_below_the_user_s_threshold_are_nobody_s_business() -> None:
    patient, strict = LeakDetector(30 * MIB), LeakDetector(0.5 * MIB)
    for step in range(600):
        for detector in (patient, strict):
            detector.add(step, 1000 * MIB + 20 * MIB * step)
    assert patient.verdict_bytes is None
    assert strict.verdict_bytes is not None


def test_nothing_is_said_about_nothing() -> None:
    detector = LeakDetector(0.5 * MIB)
    assert detector.verdict_bytes is None
    assert detector.slope_bytes is None
    for step in range(10):
        detector.add(step, 5)
    assert detector.verdict_bytes is None
