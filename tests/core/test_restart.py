"""When another life is worth it, and how long to wait for it."""

from mlx_supervisor.core.causes import MEMORY_CAUSES, Cause
from mlx_supervisor.core.policy import RestartPolicy
from mlx_supervisor.core.restart import REFUSED_STARTS_AT_MOST, RestartBudget


def test_so_many_lives_without_progress_are_the_end() -> None:
    budget = RestartBudget(RestartPolicy(max_without_progress=3))
    assert [budget.life_ended(progress=False, shrunk=False) for _ in range(3)] == [True, True, False]


def test_progress_starts_the_count_again() -> None:
    budget = RestartBudget(RestartPolicy(max_without_progress=2))
    for _ in range(50):
        assert budget.life_ended(progress=False, shrunk=False)
        assert budget.life_ended(progress=True, shrunk=False)


def test_a_smaller_batch_is_not_held_against_the_run() -> None:
    budget = RestartBudget(RestartPolicy(max_without_progress=1))
    assert budget.life_ended(progress=False, shrunk=True)
    assert not budget.life_ended(progress=False, shrunk=False)


def test_the_wait_doubles_up_to_its_bound() -> None:
    budget = RestartBudget(RestartPolicy(max_without_progress=10_000, backoff_s=1.0, backoff_max_s=60.0))
    waits = []
    for _ in range(2000):
        budget.life_ended(progress=False, shrunk=False)
        waits.append(budget.delay_s(Cause.CRASH, progress=False, shrunk=False))
    assert waits[:8] == [1, 2, 4, 8, 16, 32, 60, 60]
    assert set(waits[8:]) == {60}


def test_nobody_waits_for_a_cause_that_was_dealt_with() -> None:
    budget = RestartBudget(RestartPolicy())
    for cause in Cause:
        at_once = cause is Cause.ASKED or cause in MEMORY_CAUSES
        assert (budget.delay_s(cause, progress=False, shrunk=True) == 0) is at_once
        assert (budget.delay_s(cause, progress=False, shrunk=False) == 0) is (cause is Cause.ASKED)


def test_a_life_that_saved_something_new_is_followed_at_once() -> None:
    """However often the run was killed before: each second of waiting would be lost, and it gets to its end."""
    budget = RestartBudget(RestartPolicy(max_without_progress=100))
    for _ in range(20):
        budget.life_ended(progress=False, shrunk=False)
    for cause in Cause:
        assert budget.delay_s(cause, progress=True, shrunk=False) == 0


def test_starts_that_the_world_refuses_are_bounded_and_forgotten_after_a_start() -> None:
    budget = RestartBudget(RestartPolicy(backoff_s=1.0, backoff_max_s=60.0))
    delays = [budget.start_refused() for _ in range(REFUSED_STARTS_AT_MOST + 1)]
    assert delays[:7] == [1, 2, 4, 8, 16, 32, 60]
    assert delays[-1] is None
    assert None not in delays[:-1]
    budget.started()
    assert budget.start_refused() == 1
