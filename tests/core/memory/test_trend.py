"""The trend of a floor: finds lasting growth below temporary changes."""

import random
from collections.abc import Iterable
from statistics import median

import pytest
from tests.core.memory.traces import healthy, leaking

from mlx_supervisor.core.memory.growth import ARRAYS_SCALES, EAGER_SCALES, NATIVE_SCALES
from mlx_supervisor.core.memory.trend import WARM_UP_SAMPLES, Trend

SEEDS = range(20)
MB = 1e6


def _trend() -> Trend:
    return Trend(NATIVE_SCALES)


def _fed(values_mb: Iterable[float], trend: Trend | None = None) -> Trend:
    result = trend or _trend()
    for step, value in enumerate(values_mb):
        result.add(step, value * MB)
    return result


def _verdicts(values_mb: Iterable[float], trend: Trend | None = None) -> list[int]:
    """Steps at which there is a verdict."""
    found, result = [], trend or _trend()
    for step, value in enumerate(values_mb):
        result.add(step, value * MB)
        if result.leak_bytes is not None:
            found.append(step)
    return found


@pytest.mark.parametrize(("slope_mb", "at_most"), [(1, 280), (5, 60), (50, 30), (100, 30)])
def test_a_leak_is_found_in_time(slope_mb: float, at_most: int) -> None:
    delays = []
    for seed in SEEDS:
        found = [step - 400 for step in _verdicts(leaking(seed, slope_mb, 400, 800)) if step >= 400]
        delays.append(found[0] if found else 10_000)
    assert median(delays) <= at_most


def test_a_healthy_run_is_left_alone_after_warm_up() -> None:
    assert [seed for seed in SEEDS if any(step >= WARM_UP_SAMPLES for step in _verdicts(healthy(seed, 1200)))] == []


def test_there_is_no_verdict_in_the_warm_up() -> None:
    assert _verdicts(1000 + 20 * step for step in range(300))[0] >= WARM_UP_SAMPLES - 1


def test_the_slope_is_measured() -> None:
    trend = _fed(1000 + 20 * step for step in range(200))
    assert trend.leak_bytes == pytest.approx(20 * MB, rel=0.01)
    assert trend.slope_bytes == pytest.approx(20 * MB, rel=0.01)


def test_steps_without_a_sample_do_not_bend_the_slope() -> None:
    trend = _trend()
    for step in range(0, 900, 3):
        if step % 7:
            trend.add(step, (1000 + 20 * step) * MB)
    assert trend.leak_bytes == pytest.approx(20 * MB, rel=0.01)


@pytest.mark.parametrize("seed", SEEDS)
def test_one_level_shift_is_no_leak(seed: int) -> None:
    shifted = (value + (400 if step >= 300 + seed else 0) for step, value in enumerate(healthy(seed, 700)))
    assert _verdicts(shifted) == []


def test_growth_that_flattens_out_is_no_leak() -> None:
    for pace in (0.9, 0.97, 0.985, 0.99):
        assert _verdicts(2000 - 1000 * pace**step for step in range(800)) == []


def test_the_verdict_is_revoked_when_a_leak_stops() -> None:
    found = _verdicts(1000 + 5 * min(step, 400) for step in range(800))
    assert found[0] < 400
    assert found[-1] < 700


def test_a_verdict_is_revoked_when_the_floor_returns() -> None:
    found = _verdicts(1000 + (5 * step if step < 400 else 0) for step in range(500))
    assert found[0] < 400 <= found[-1] <= 402


def _saw(step: int) -> float:
    """Up by 5 MB per step for 150 steps, then down at once."""
    return 1000 + 5 * (step % 150)


def test_a_return_to_an_earlier_height_is_no_leak() -> None:
    assert _verdicts(1750 if step < 150 else _saw(step) for step in range(1500)) == []


def test_the_same_rise_again_is_no_leak() -> None:
    """A list emptied every epoch: only the first rise may count as a leak."""
    found = _verdicts(1000 if step < 300 else _saw(step) for step in range(1800))
    assert found != []
    assert found[-1] < 300 + 150 + 2


def test_an_old_peak_hides_no_leak() -> None:
    found = _verdicts(3000 if 100 <= step < 400 else 1000 + 5 * max(step - 2500, 0) for step in range(2600))
    assert 2500 <= found[0] <= 2580


def test_a_slow_drift_and_a_level_shift_are_no_fast_leak() -> None:
    assert _verdicts(1000 + 0.4 * step + (300 if step >= 330 else 0) for step in range(800)) == []


def test_an_accelerating_leak_is_measured_at_its_present_rate() -> None:
    trend = _fed(1000 + step + 49 * max(step - 800, 0) for step in range(840))
    assert trend.leak_bytes == pytest.approx(50 * MB, rel=0.2)


def test_a_verdict_does_not_alternate() -> None:
    for seed in SEEDS:
        found = [step for step in _verdicts(leaking(seed, 5, 400, 900)) if step >= 400]
        assert found == list(range(found[0], 900)), f"seed {seed}"


def test_a_projection_takes_no_evaluation_for_a_leak() -> None:
    """Twelve steps up, to an earlier height of the floor."""
    eager = Trend(EAGER_SCALES, eager=True)
    climb = (1000 + 60 * max(step - 400, 0) if step < 412 else 1000 for step in range(300, 500))
    assert _verdicts([2000] * 300 + list(climb), eager) == []


def test_a_projection_takes_no_noise_for_a_leak() -> None:
    chance = random.Random(3)
    eager = Trend(EAGER_SCALES, eager=True)
    assert _verdicts((1000 + chance.uniform(0, 600) for _ in range(3000)), eager) == []


def test_leaks_below_the_user_s_threshold_are_ignored() -> None:
    patient = Trend(NATIVE_SCALES, 30 * MB)
    assert _verdicts((1000 + 20 * step for step in range(600)), patient) == []
    assert _verdicts(1000 + 20 * step for step in range(600)) != []


def test_a_projection_does_not_wait_for_the_end_of_the_warm_up() -> None:
    eager = Trend(EAGER_SCALES, eager=True)
    assert _verdicts((1000 + 50 * step for step in range(40)), eager)[0] <= 15


def test_a_constant_signal_has_no_leak() -> None:
    trend = Trend(ARRAYS_SCALES)
    assert (trend.leak_bytes, trend.slope_bytes) == (None, None)
    _fed([5] * 10, trend)
    assert (trend.leak_bytes, trend.slope_bytes) == (None, None)
    _fed([5] * 300, trend)
    assert (trend.leak_bytes, trend.slope_bytes) == (None, 0.0)
