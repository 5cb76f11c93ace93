"""Whether to restart, and how long to wait before it."""

from collections.abc import Iterator
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.core.policies import restart_policy

from mlx_supervisor.core.diagnosis.causes import MEMORY_CAUSES, Cause
from mlx_supervisor.core.history import RunHistory
from mlx_supervisor.core.policy import RestartPolicy
from mlx_supervisor.core.restart.budget import REFUSED_STARTS_AT_MOST, RestartBudget
from mlx_supervisor.core.restart.external import HOURS_AT_MOST


def steady(**changes: float) -> RestartPolicy:
    """Without jitter."""
    return restart_policy(**{"jitter": 0.0} | changes)


def waits(budget: RestartBudget, uptime_s: float = 0.0) -> Iterator[float]:
    """The waits of consecutive generations without progress."""
    while True:
        budget.generation_ended(Cause.CRASH, progress=False, uptime_s=uptime_s)
        yield budget.delay_s(Cause.CRASH, progress=False, eased=False)


@pytest.mark.parametrize(("cause", "key"), [
    (Cause.CRASH, "restart.max_without_progress"),
    (Cause.HANG, "restart.max_without_progress"),
    (Cause.PRESSURE, "restart.max_memory_without_progress"),
    (Cause.LEAK, "restart.max_memory_without_progress"),
    (Cause.RESOURCE_LIMIT, "restart.max_memory_without_progress"),
])  # fmt: skip
def test_the_run_fails_after_so_many_generations_without_progress(cause: Cause, key: str) -> None:
    budget = RestartBudget(restart_policy(max_without_progress=3, max_memory_without_progress=3))
    assert [budget.generation_ended(cause, progress=False) for _ in range(2)] == [None, None]
    last = budget.generation_ended(cause, progress=False)
    assert last is not None
    assert "3 consecutive generations without a new checkpoint" in last
    assert key in last


def test_memory_and_crashes_are_counted_apart() -> None:
    budget = RestartBudget(restart_policy(max_without_progress=2, max_memory_without_progress=2))
    assert budget.generation_ended(Cause.CRASH, progress=False) is None
    assert budget.generation_ended(Cause.PRESSURE, progress=False) is None
    assert budget.generation_ended(Cause.CRASH, progress=False) is not None


@pytest.mark.parametrize("cause", [Cause.CRASH, Cause.PRESSURE])
def test_progress_starts_every_count_again(cause: Cause) -> None:
    budget = RestartBudget(restart_policy(max_without_progress=2, max_memory_without_progress=2, max_reboots=2))
    for _ in range(50):
        assert budget.generation_ended(cause, progress=False) is None
        assert budget.rebooted(progress=False) is None
        assert budget.generation_ended(Cause.CRASH, progress=True) is None


def test_a_generation_followed_by_one_in_less_need_is_not_counted() -> None:
    budget = RestartBudget(restart_policy(max_memory_without_progress=2))
    assert budget.generation_ended(Cause.PRESSURE, progress=False) is None
    assert budget.generation_ended(Cause.PRESSURE, progress=False, eased=True) is None
    assert budget.generation_ended(Cause.PRESSURE, progress=False) is not None


def test_the_wait_doubles_up_to_its_bound() -> None:
    budget = RestartBudget(steady(max_without_progress=10_000, backoff_s=1.0, backoff_max_s=60.0))
    each = waits(budget)
    assert [next(each) for _ in range(8)] == [1, 2, 4, 8, 16, 32, 60, 60]
    assert {next(each) for _ in range(2000)} == {60}


@pytest.mark.parametrize(("uptime_s", "expected"), [(599.0, [1, 2, 4]), (600.0, [1, 1, 1])])
def test_healthy_time_resets_the_wait_but_not_the_count(uptime_s: float, expected: list[int]) -> None:
    past = RunHistory()
    each = waits(RestartBudget(steady(healthy_s=600.0), past), uptime_s)
    assert [next(each) for _ in range(3)] == expected
    assert past.without_progress == 3


def test_counts_and_waits_survive_the_supervisor() -> None:
    past = RunHistory()
    first = RestartBudget(steady(max_without_progress=3), past)
    assert [next(waits(first)) for _ in range(2)] == [1, 2]
    after = RestartBudget(steady(max_without_progress=3), RunHistory.restore(past.snapshot()))
    assert after.generation_ended(Cause.CRASH, progress=False) is not None
    assert after.delay_s(Cause.CRASH, progress=False, eased=False) == 4


def test_a_cause_that_was_dealt_with_needs_no_wait() -> None:
    for cause in Cause:
        at_once = cause is Cause.REQUESTED or cause in MEMORY_CAUSES
        budget = RestartBudget(restart_policy())
        assert (budget.delay_s(cause, progress=False, eased=True) == 0) is at_once
        assert (budget.delay_s(cause, progress=False, eased=False) == 0) is (cause is Cause.REQUESTED)


def test_a_generation_with_a_new_checkpoint_is_followed_at_once() -> None:
    """However often the run was killed before: waiting would only cost time."""
    budget = RestartBudget(restart_policy(max_without_progress=100))
    for _ in range(20):
        budget.generation_ended(Cause.CRASH, progress=False)
    for cause in Cause:
        assert budget.delay_s(cause, progress=True, eased=False) == 0


@given(st.floats(0, 1), st.integers(0, 2**31), st.integers(0, 10**6))
def test_jitter_only_lengthens_a_wait_and_is_deterministic(jitter: float, seed: int, generation: int) -> None:
    budget = RestartBudget(restart_policy(jitter=jitter), RunHistory(generation=generation), seed)
    waited = budget.delay_s(Cause.CRASH, progress=False, eased=False)
    assert 1.0 <= waited <= 1.0 + jitter
    again = RestartBudget(restart_policy(jitter=jitter), RunHistory(generation=generation), seed)
    assert again.delay_s(Cause.CRASH, progress=False, eased=False) == waited


def test_runs_that_died_together_start_apart() -> None:
    pairs = [(generation, seed) for generation in range(1, 11) for seed in range(100)]
    budgets = [RestartBudget(restart_policy(jitter=1.0), RunHistory(generation=g), seed) for g, seed in pairs]
    delays_s = sorted(budget.delay_s(Cause.CRASH, progress=False, eased=False) for budget in budgets)
    assert 1 <= delays_s[0] <= delays_s[-1] < 2
    assert all(later > sooner for sooner, later in pairwise(delays_s))
    assert all(sum(low <= 10 * (each - 1) < low + 1 for each in delays_s) > 60 for low in range(10))


def test_failed_starts_are_bounded_and_reset_by_a_start() -> None:
    budget = RestartBudget(steady(backoff_s=1.0, backoff_max_s=60.0))
    delays = [budget.start_refused() for _ in range(REFUSED_STARTS_AT_MOST + 1)]
    assert delays[:7] == [1, 2, 4, 8, 16, 32, 60]
    assert delays[-1] is None
    assert None not in delays[:-1]
    budget.started()
    assert budget.start_refused() == 1


def test_machine_restarts_without_progress_are_bounded() -> None:
    budget = RestartBudget(restart_policy(max_reboots=2))
    assert budget.rebooted(progress=False) is None
    assert budget.rebooted(progress=True) is None
    assert budget.rebooted(progress=False) is None
    last = budget.rebooted(progress=False)
    assert last is not None
    assert "restart.max_reboots" in last


def test_other_causes_are_never_the_same_error() -> None:
    budget = RestartBudget(restart_policy(max_same_error=2))
    assert not any(budget.repeated(Cause.KILLED, "", 5) for _ in range(9))


def test_one_error_is_enough_if_the_settings_say_so() -> None:
    assert RestartBudget(restart_policy(max_same_error=1)).repeated(Cause.CRASH, "ValueError", 5)


def test_deaths_by_other_processes_are_a_rate() -> None:
    history = RunHistory()
    budget = RestartBudget(restart_policy(max_without_progress=1, max_external=3, backoff_s=1.0, jitter=0.0), history)
    ends: list[str | None] = []
    at_s = 0.0
    while not ends or ends[-1] is None:
        ends.append(budget.generation_ended(Cause.KILLED, progress=False, at_s=at_s))
        assert len(history.external_s) <= 3
        at_s += budget.delay_s(Cause.KILLED, progress=False, eased=False, at_s=at_s)
    assert len(ends) == 3 * HOURS_AT_MOST
    assert at_s > (HOURS_AT_MOST - 1) * 3600
    assert "restart.max_external" in str(ends[-1])


def test_a_checkpoint_or_a_person_clears_the_budget_for_deaths_by_other_processes() -> None:
    history = RunHistory(external_without_progress=71, external_s=[5.0, 6.0, 7.0])
    budget = RestartBudget(restart_policy(max_external=3), history)
    assert budget.generation_ended(Cause.INTERRUPTED, progress=True, at_s=8.0) is None
    assert history.external_without_progress == 0
    budget.reset()
    assert budget.delay_s(Cause.INTERRUPTED, progress=False, eased=False, at_s=9.0) < 3
