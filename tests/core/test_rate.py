"""Tokens per second and time left, over wall time."""

from collections.abc import Iterable

import pytest
from tests.core.machine.timeline import MachineTimeline

from mlx_supervisor.core.events import StepReport
from mlx_supervisor.core.rate import WINDOW_S, WINDOW_STEPS, Rate

TOKENS = 500


def report(at_s: float, step: int, tokens: int = TOKENS, seconds: float = 1.0) -> StepReport:
    return StepReport(at_s, 1, step, 1.0, tokens, 8, 1e-3, seconds, 8, 1, 0, 0)


def rate_after(times: Iterable[float], tokens: int = TOKENS, seconds: float = 1.0) -> Rate:
    rate = Rate()
    for step, at_s in enumerate(times, 1):
        rate.add(report(at_s, step, tokens, seconds))
    return rate


def per_s(rate: Rate) -> float:
    speed = rate.speed(0)
    assert speed is not None
    return speed.per_s


def left_s(rate: Rate, target_steps: int) -> float | None:
    speed = rate.speed(target_steps)
    assert speed is not None
    return speed.left_s


def test_nothing_is_known_before_two_updates() -> None:
    for updates in (0, 1):
        rate = rate_after([7.0] * updates)
        assert rate.speed(100) is None
    rate = rate_after([7.0, 9.0])
    assert rate.speed(100) == (250.0, "tokens", 196.0)


def test_the_time_left_is_unknown_without_a_target_and_never_negative() -> None:
    rate = rate_after([0.0, 1.0, 2.0])
    assert left_s(rate, 0) is None
    assert left_s(rate, 3) == left_s(rate, 2) == 0


@pytest.mark.parametrize("step_s", [0.001, 0.1, 1.0, 1.6, 20.0])
@pytest.mark.parametrize("updates", [60, 1000])
def test_an_even_pace_is_exact_whatever_seconds_the_reports_name(step_s: float, updates: int) -> None:
    for seconds in (1e-4, 30.0):
        rate = rate_after([step * step_s for step in range(updates)], seconds=seconds)
        assert per_s(rate) == pytest.approx(TOKENS / step_s)
        assert left_s(rate, updates + 100) == pytest.approx(100 * step_s)


def test_pipelined_bursts_show_their_average_from_the_tenth_update_on() -> None:
    """Pairs of updates end together: the worker's own figures alternate between 500,000 and 500 tokens/s."""
    rate, times = Rate(), [pair * 2.0 + late for pair in range(100) for late in (0.0, 0.001)]
    for step, at_s in enumerate(times, 1):
        rate.add(report(at_s, step, seconds=0.001 if step % 2 == 0 else 1.999))
        if step >= 10:
            first = max(step - WINDOW_STEPS, 1)
            true = (step - first) * TOKENS / (at_s - times[first - 1])
            assert per_s(rate) == pytest.approx(true, rel=0.05)
    assert per_s(rate) == pytest.approx(TOKENS, rel=0.06)


def test_reports_that_arrive_together_give_no_rate_yet() -> None:
    assert rate_after([0.0, 1e-6, 2e-6]).speed(9) is None


def test_a_pause_counts_while_it_is_in_the_window() -> None:
    before = [float(step) for step in range(100)]
    rate = rate_after([*before, 99 + 60.0])
    assert per_s(rate) < TOKENS / 2
    after = [159.0 + step for step in range(1, 60)]
    assert per_s(rate_after([*before, 159.0, *after])) == pytest.approx(TOKENS), "the window has passed it"


def test_the_window_is_30_s_of_short_updates_and_20_long_ones() -> None:
    slow = [step * 1.0 for step in range(100)]
    fast = [99 + step * 0.1 for step in range(1, int(WINDOW_S / 0.1) * 2)]
    assert per_s(rate_after([*slow, *fast])) == pytest.approx(10 * TOKENS)
    assert per_s(rate_after([*slow, *fast[: int(WINDOW_S / 0.1 / 2)]])) < 9 * TOKENS
    longer = [99 + step * 10.0 for step in range(1, WINDOW_STEPS + 1)]
    assert per_s(rate_after([*slow, *longer])) == pytest.approx(TOKENS / 10, rel=0.05)
    assert per_s(rate_after([*slow, *longer[:-5]])) > 1.1 * TOKENS / 10


def test_samples_are_counted_where_the_task_counts_no_tokens() -> None:
    assert rate_after([0.0, 2.0, 4.0], tokens=0).speed(4) == (4.0, "samples", 2.0)


def test_a_repeated_report_is_ignored_and_a_lost_one_does_not_delay_the_end() -> None:
    rate = Rate()
    for step in (1, 2, 2, 1, 3, 4):
        rate.add(report(float(step), step))
    assert per_s(rate) == TOKENS
    for step in (8, 9):
        rate.add(report(float(step), step))
    assert left_s(rate, 19) == 10


def test_each_generation_is_measured_alone() -> None:
    timeline = MachineTimeline()
    timeline.play("start -> starting: save, spawn 1 batch 8 of 8\nready -> running\nsteps 5 -> running")
    rate = timeline.machine.rate
    assert per_s(rate) == pytest.approx(100 / 0.3)
    timeline.play(
        "restart -> draining: ask stop\nexit 0 -> starting: close requested, save, spawn 2 batch 8 of 8 save 2"
    )
    assert timeline.machine.rate.speed(9) is None
    timeline.play("ready after=600 -> running\nsteps 1 seconds=0.5 -> running")
    assert timeline.machine.rate.speed(9) is None
    timeline.play("steps 1 seconds=0.4 -> running")
    assert per_s(timeline.machine.rate) == pytest.approx(100 / 0.5)
