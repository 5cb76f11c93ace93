"""How often a checkpoint is taken: the formula, its bounds, and what is measured for it."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_worker.checkpoint.interval import (
    FIRST_S,
    LONGEST_S,
    SHORTEST_S,
    WRITE_FACTOR,
    MeasuredInterval,
    SlowDown,
    interval_s,
)

costs = st.floats(0, 3600)
writes = st.floats(0, 3600)
times = st.floats(1, 1e8)
overheads = st.floats(1e-4, 0.5)


@given(costs, writes, times, overheads)
def test_checkpoints_cost_at_most_the_overhead_and_the_writer_idles(
    cost_s: float, write_s: float, between_s: float, overhead: float
) -> None:
    found_s = interval_s(cost_s, write_s, between_s, overhead)
    assert cost_s <= overhead * found_s * (1 + 1e-9)
    assert found_s >= WRITE_FACTOR * write_s
    assert found_s >= SHORTEST_S


@given(costs, writes, times, overheads)
def test_a_kill_costs_at_most_ten_minutes_where_that_is_cheap_enough(
    cost_s: float, write_s: float, between_s: float, overhead: float
) -> None:
    if cost_s / overhead <= LONGEST_S and write_s <= LONGEST_S / WRITE_FACTOR:
        assert interval_s(cost_s, write_s, between_s, overhead) <= LONGEST_S


@given(costs, writes, times, times, overheads)
def test_the_rarer_the_failures_the_rarer_the_checkpoints(
    cost_s: float, write_s: float, one_s: float, other_s: float, overhead: float
) -> None:
    rare, often = (
        interval_s(cost_s, write_s, between_s, overhead) for between_s in (max(one_s, other_s), min(one_s, other_s))
    )
    assert rare >= often


def waste(interval: float, cost_s: float, between_s: float) -> float:
    """First-order loss per second of training: the cost of checkpoints plus the work repeated after failures."""
    return cost_s / interval + interval / (2 * between_s)


@given(st.floats(0.01, 2), st.floats(600, 1e5), st.floats(0.2, 5))
def test_between_its_bounds_no_other_interval_wastes_less(cost_s: float, between_s: float, factor: float) -> None:
    found_s = interval_s(cost_s, 0.0, between_s, 0.5)
    if SHORTEST_S < found_s < LONGEST_S:
        assert waste(found_s, cost_s, between_s) <= waste(factor * found_s, cost_s, between_s) * (1 + 1e-9)


def test_a_worked_example() -> None:
    assert interval_s(0.5, 2.0, 14_400.0, 0.01) == pytest.approx(120.0)  # Young's: sqrt(2 * 0.5 * 14400)
    assert interval_s(0.5, 2.0, 900.0, 0.01) == pytest.approx(50.0)  # 30 by Young, and 0.5 s are 1 % of 50
    assert interval_s(0.0, 2.0, 900.0, 0.01) == pytest.approx(20.0)  # the writer must idle
    assert interval_s(30.0, 30.0, 1e9, 0.01) == pytest.approx(3000.0)  # the overhead is as requested


def test_measured_costs_are_averaged_and_older_ones_forgotten() -> None:
    measured = MeasuredInterval(0.5, 800.0)
    assert measured.seconds(0.0) == FIRST_S
    measured.note(3.0, 0.5)
    measured.note(-1.0, 0.5)  # updates during the write happened to be faster
    assert measured.seconds(0.0) == pytest.approx(math.sqrt(2 * 1.0 * 800))
    for _ in range(8):
        measured.note(4.0, 0.5)
    assert measured.seconds(0.0) == pytest.approx(math.sqrt(2 * 4.0 * 800))
    assert measured.seconds(3200.0) == pytest.approx(math.sqrt(2 * 4.0 * 3200)), (
        "this generation alone has lasted longer"
    )
    for _ in range(8):
        measured.note(-1.0, 0.0)
    assert measured.seconds(0.0) == SHORTEST_S


def test_updates_beside_a_write_are_held_against_it() -> None:
    slow_down = SlowDown()
    slow_down.note_update(9.0, writing=True)  # no undisturbed update to compare with yet
    assert slow_down.take_s() == 0.0
    for _ in range(10):
        slow_down.note_update(1.0, writing=False)
    slow_down.note_update(0.1, writing=False)  # waited for, so that the next one takes longer: together they are 2
    slow_down.note_update(1.9, writing=True)
    assert slow_down.take_s() == pytest.approx(0.0)
    slow_down.note_update(1.0, writing=False)
    for seconds in (1.5, 1.25):
        slow_down.note_update(seconds, writing=True)
    assert slow_down.take_s() == pytest.approx(0.75)
    assert slow_down.take_s() == 0.0
