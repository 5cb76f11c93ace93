"""The batch plan: halving, growing, and the effective batch."""

from hypothesis import given
from hypothesis import strategies as st
from tests.core.policies import batch_policy

from mlx_supervisor.core.restart.batch import BatchPlan


def test_halving_stops_at_the_minimum() -> None:
    plan = BatchPlan(batch_policy(size=12, minimum=2))
    sizes = [plan.size for _ in range(5) if plan.halve(for_pressure=True)]
    assert sizes == [6, 3, 2]
    assert plan.at_minimum
    assert plan.tripped == {12, 6, 3}


def test_a_leak_does_not_forbid_the_size() -> None:
    plan = BatchPlan(batch_policy(size=8, grow_after_steps=3))
    plan.halve(for_pressure=False)
    assert [plan.good_step() for _ in range(7)] == [None, None, 8, None, None, None, None]


def test_the_pending_growth_is_known() -> None:
    plan = BatchPlan(batch_policy(size=8, grow_after_steps=3))
    assert plan.growth_due is None
    plan.halve(for_pressure=False)
    assert plan.growth_due == (8, 3)
    plan.good_step()
    assert plan.growth_due == (8, 2)
    plan.good_step()
    plan.good_step()
    plan.halve(for_pressure=True)
    assert plan.growth_due is None


def test_a_leak_s_halving_is_known_until_the_size_has_grown_back() -> None:
    plan = BatchPlan(batch_policy(size=8, grow_after_steps=1))
    assert not plan.reduced_for_leak
    plan.halve(for_pressure=False)
    assert plan.reduced_for_leak
    again = BatchPlan(batch_policy(size=8), plan.size, plan.tripped, plan.leak_from)
    assert again.reduced_for_leak
    plan.halve(for_pressure=False)
    assert plan.good_step() == 4
    assert plan.reduced_for_leak
    assert plan.good_step() == 8
    assert not plan.reduced_for_leak


def test_a_size_reduced_for_pressure_is_not_reduced_for_a_leak() -> None:
    plan = BatchPlan(batch_policy(size=8))
    plan.halve(for_pressure=True)
    assert not plan.reduced_for_leak


def test_a_trip_resets_the_count_of_good_steps() -> None:
    plan = BatchPlan(batch_policy(size=8, grow_after_steps=3))
    plan.halve(for_pressure=False)
    plan.good_step()
    plan.good_step()
    plan.halve(for_pressure=False)
    assert [plan.good_step() for _ in range(3)] == [None, None, 4]


def test_restored_sizes_are_bounded_by_the_settings() -> None:
    assert BatchPlan(batch_policy(size=8), 32).size == 8
    assert BatchPlan(batch_policy(size=8, minimum=4), 2).size == 4


@given(st.integers(1, 64), st.integers(1, 8), st.integers(1, 8), st.booleans(), st.lists(st.booleans(), max_size=60))
def test_every_plan(size: int, accumulation: int, minimum: int, preserve: bool, trips: list[bool]) -> None:
    plan = BatchPlan(
        batch_policy(
            size,
            accumulation=accumulation,
            preserve_effective=preserve,
            minimum=min(minimum, size),
            grow_after_steps=2,
        )
    )
    for trip in trips:
        if trip:
            plan.halve(for_pressure=True)
        else:
            larger = plan.good_step()
            assert larger is None or all(larger < each for each in plan.tripped)
        assert plan.size is not None
        assert plan.effective is not None
        assert min(minimum, size) <= plan.size <= size
        assert 1 <= plan.effective <= size * accumulation
        if preserve:
            assert plan.effective == size * accumulation


def test_a_changed_request_counts_at_once_unless_trips_reduced_the_size() -> None:
    assert BatchPlan(batch_policy(size=16), 8, last_requested=8).size == 16
    assert BatchPlan(batch_policy(size=4), 8, last_requested=8).size == 4
    assert BatchPlan(batch_policy(size=16), 4, frozenset({8}), last_requested=8).size == 4
    assert BatchPlan(batch_policy(size=16), 8, frozenset({12}), last_requested=8).size == 8


def test_the_tasks_changed_request_counts_where_the_settings_leave_it_open() -> None:
    plan = BatchPlan(batch_policy(size=None), 4, last_requested=8)
    plan.adopt(8, 8)
    plan.request(8, 8, 4)
    assert (plan.requested, plan.size) == (8, 4)
    plan.request(16, 32, 4)
    assert (plan.requested, plan.requested_effective, plan.size, plan.effective) == (16, 32, 4, 32)
    chosen = BatchPlan(batch_policy(size=8))
    chosen.request(16, 32, 16)
    assert (chosen.requested, chosen.size) == (8, 8)
