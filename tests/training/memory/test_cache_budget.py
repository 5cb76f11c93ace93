"""The cache may hold what the limits leave, and no more."""

from mlx_worker.memory import cache_budget
from mlx_worker.memory.cache_budget import CacheBudget

GIB = 2**30


def settled(budget, active, peak, other=0, steps=64):
    for _ in range(steps):
        budget.add(active, peak, other)
    return budget.cache_limit_bytes


def test_need_and_cache_stay_under_the_limit_together():
    """The CPU's allocator enforces no limit: a cache that is full when the need comes must still fit."""
    for need in (1, 4, 7):
        budget = CacheBudget(10 * GIB, own=False, enforced=False)
        cache = settled(budget, GIB // 2, need * GIB, other=GIB)
        assert need * GIB + cache + GIB <= cache_budget.HOST_SHARE * 10 * GIB
        assert cache > 0


def test_an_enforcing_allocator_gets_the_whole_room():
    """With 8 of 10 GiB needed at the peak but 1 between updates, the buffers of one update serve the next."""
    budget = CacheBudget(10 * GIB, own=True, enforced=True)
    assert settled(budget, 1 * GIB, 8 * GIB) == int(0.95 * 10 * GIB) - GIB
    assert budget.room_bytes == int(0.95 * 10 * GIB)


def test_memory_of_the_process_counts_where_it_is_the_same_memory():
    assert CacheBudget(10 * GIB, own=True, enforced=True).is_under_pressure(4 * GIB, 4 * GIB, 3 * GIB) is False
    assert CacheBudget(10 * GIB, own=False, enforced=True).is_under_pressure(4 * GIB, 4 * GIB, 3 * GIB) is True
    assert CacheBudget(10 * GIB, own=False, enforced=True).is_under_pressure(9 * GIB, 0, 3 * GIB) is False
    unified, own = (CacheBudget(10 * GIB, own=own, enforced=True) for own in (False, True))
    assert settled(own, GIB, 4 * GIB, 3 * GIB) - settled(unified, GIB, 4 * GIB, 3 * GIB) >= 3 * GIB


def test_shared_memory_is_not_filled_with_rare_shapes():
    budget = CacheBudget(100 * GIB, own=False, enforced=True)
    assert settled(budget, GIB // 4, GIB) == 3 * GIB


def test_a_need_beyond_the_room_leaves_no_cache_and_no_overlap():
    budget = CacheBudget(10 * GIB, own=False, enforced=False)
    assert settled(budget, GIB, 9 * GIB) == 0
    assert budget.tight
    budget = CacheBudget(10 * GIB, own=False, enforced=False)
    settled(budget, GIB, 4 * GIB)
    assert not budget.tight


def test_noise_moves_nothing():
    budget = CacheBudget(10 * GIB, own=False, enforced=False)
    settled(budget, GIB, 4 * GIB)
    moves = [budget.add(GIB, 4 * GIB + step % 7 * GIB // 100, step % 5 * GIB // 100) for step in range(200)]
    assert not [move for move in moves if move is not None]


def test_a_grown_need_counts_at_the_next_review():
    budget = CacheBudget(10 * GIB, own=False, enforced=False)
    before = settled(budget, GIB, 2 * GIB)
    moves = [budget.add(GIB, 7 * GIB, 0) for _ in range(cache_budget.REVIEW_EVERY_STEPS)]
    assert [move for move in moves if move is not None] == [int(0.85 * 10 * GIB) - 7 * GIB]
    assert budget.cache_limit_bytes < before


def test_a_need_of_long_ago_is_forgotten():
    budget = CacheBudget(10 * GIB, own=False, enforced=False)
    settled(budget, GIB, 8 * GIB, steps=16)
    assert settled(budget, GIB, 2 * GIB, steps=1000) > 5 * GIB


def test_relief_halves_the_cache_at_once_and_the_limit_recovers():
    budget = CacheBudget(10 * GIB, own=False, enforced=True)
    full = settled(budget, GIB, 2 * GIB)
    assert budget.relieve() == full // 2
    assert budget.relieve() == full // 4
    assert settled(budget, GIB, 2 * GIB, steps=2 * cache_budget.REVIEW_EVERY_STEPS) < full
    assert settled(budget, GIB, 2 * GIB, steps=20 * cache_budget.REVIEW_EVERY_STEPS) >= full / 1.2


def test_relief_before_anything_was_measured():
    budget = CacheBudget(10 * GIB, own=False, enforced=True)
    assert budget.relieve() is None
    assert budget.add(GIB, 2 * GIB, 0) < 6 * GIB
