"""The order of samples: after a restart or a halving, no sample is skipped or used twice."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_worker.data.batches import EffectiveBatches
from mlx_worker.data.order import Grouping, grouped, permutation

counts = st.integers(1, 60)
seeds = st.integers(0, 2**62)

RECORDED = [
    [1, 8, 6, 5, 9, 10, 2, 4, 7, 0, 11, 3],
    [1, 10, 4, 9, 3, 2, 11, 6, 5, 8, 0, 7],
    [4, 5, 1, 3, 9, 11, 6, 0, 8, 2, 10, 7],
]


@st.composite
def cuts(draw: st.DrawFn) -> tuple[int, int, list[int]]:
    """A dataset's size, a seed, and sizes of batches taken one after another."""
    count = draw(counts)
    return count, draw(seeds), draw(st.lists(st.integers(1, count), max_size=30))


@given(cuts())
def test_any_cut_gives_the_same_stream_of_whole_epochs(case: tuple[int, int, list[int]]) -> None:
    count, seed, sizes = case
    batches = EffectiveBatches(count, seed)
    taken = [sample for size in sizes for sample in batches.next(size)]
    expected: list[int] = []
    while len(expected) < sum(sizes):
        expected += permutation(count, seed, len(expected) // count).tolist()
    assert taken == expected[: sum(sizes)]
    assert batches.cursor == len(taken)
    assert batches.epoch == len(taken) // count


@given(cuts(), st.data())
def test_a_new_stream_at_the_cursor_continues_where_the_old_one_ended(
    case: tuple[int, int, list[int]], data: st.DataObject
) -> None:
    count, seed, sizes = case
    unbroken = EffectiveBatches(count, seed)
    restarted = EffectiveBatches(count, seed)
    for size in sizes:
        if data.draw(st.booleans()):
            restarted = EffectiveBatches(count, seed, cursor=restarted.cursor)
        assert restarted.next(size) == unbroken.next(size)


@given(count=counts, seed=seeds, epoch=st.integers(0, 1000))
def test_every_epoch_holds_every_sample_once(count: int, seed: int, epoch: int) -> None:
    assert sorted(permutation(count, seed, epoch).tolist()) == list(range(count))


def test_the_order_is_the_one_that_older_checkpoints_were_made_with() -> None:
    """Recorded once: a change here breaks the resume of every run that exists."""
    assert permutation(12, 7, 0).tolist() == RECORDED[0]
    assert permutation(12, 7, 1).tolist() == RECORDED[1]
    assert permutation(12, 2**40 + 7, 0).tolist() == RECORDED[2]


def test_epochs_and_seeds_differ_also_where_a_seed_is_wider_than_32_bits() -> None:
    orders = {tuple(permutation(50, seed, epoch)) for seed in (0, 1, 2**32, 2**33) for epoch in range(4)}
    assert len(orders) == 16


def test_global_generators_neither_matter_nor_move() -> None:
    random.seed(1)
    np.random.seed(1)
    before = (random.getstate(), np.random.get_state(legacy=False)["state"]["pos"])
    first = EffectiveBatches(100, 3).next(100)
    assert (random.getstate(), np.random.get_state(legacy=False)["state"]["pos"]) == before
    random.seed(2)
    np.random.seed(2)
    assert EffectiveBatches(100, 3).next(100) == first


def test_ids_are_plain_integers() -> None:
    assert {type(sample) for sample in EffectiveBatches(5, 0).next(5)} == {int}


@pytest.mark.parametrize(
    ("count", "seed", "cursor", "sentence"),
    [
        (0, 0, 0, "the dataset is empty"),
        (-1, 0, 0, "sample_count must not be negative, found -1"),
        (1, -1, 0, "seed must not be negative, found -1"),
        (1, 0, -1, "cursor must not be negative, found -1"),
    ],
)
def test_bad_numbers_are_refused_by_name(count: int, seed: int, cursor: int, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        EffectiveBatches(count, seed, cursor)


def test_a_batch_larger_than_the_dataset_is_refused_and_takes_nothing() -> None:
    batches = EffectiveBatches(4, 0)
    with pytest.raises(ValueError, match="the effective batch of 5 samples exceeds the dataset's 4"):
        batches.next(5)
    with pytest.raises(ValueError, match="at least 1 sample"):
        batches.next(0)
    assert batches.cursor == 0


@pytest.mark.parametrize("wrong", [1.5, "8", None, True])
def test_a_wrong_type_is_refused(wrong: object) -> None:
    with pytest.raises(TypeError, match="must be an integer, found"):
        EffectiveBatches(10, 0).next(wrong)  # type: ignore[arg-type]


@st.composite
def groupings(draw: st.DrawFn) -> Grouping:
    count = draw(counts)
    lengths = np.array(draw(st.lists(st.integers(1, 40), min_size=count, max_size=count)))
    return Grouping(lengths, draw(st.integers(1, count)), draw(st.integers(1, 9)))


@given(groupings(), seeds, st.integers(0, 100))
def test_a_grouped_epoch_holds_every_sample_once(grouping: Grouping, seed: int, epoch: int) -> None:
    order = grouped(grouping, seed, epoch).tolist()
    assert sorted(order) == list(range(len(grouping.lengths)))
    assert order == grouped(grouping, seed, epoch).tolist()


@given(groupings(), seeds, st.lists(st.booleans(), min_size=1, max_size=40))
def test_grouped_updates_rise_in_length_and_continue_after_a_restart(
    grouping: Grouping, seed: int, restarts: list[bool]
) -> None:
    count, effective = len(grouping.lengths), grouping.effective
    unbroken = EffectiveBatches(count, seed, grouping=grouping)
    restarted = EffectiveBatches(count, seed, grouping=grouping)
    for restart in restarts:
        if restart:
            restarted = EffectiveBatches(count, seed, restarted.cursor, grouping)
        cursor = unbroken.cursor
        ids = unbroken.next(effective)
        assert restarted.next(effective) == ids
        border = -cursor % count  # samples that the epoch of the first one still has
        for part in (ids[:border], ids[border:]) if border else (ids,):
            lengths = grouping.lengths[part].tolist()
            assert lengths == sorted(lengths)


def lognormal(count: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64(1)).lognormal(np.log(200), 0.8, count).astype(np.int64) + 2


def padded_share(lengths: np.ndarray, batches: EffectiveBatches, size: int, updates: int) -> float:
    """Of all that is computed, with every batch padded to a multiple of 32 as mlx_lm does."""
    rows = lengths[np.array([batches.next(size) for _ in range(updates)])]
    computed = size * (1 + 32 * -(-rows.max(axis=1) // 32)).sum()
    return float(1 - rows.sum() / computed)


def test_grouping_pads_less_than_a_third_of_what_a_shuffle_pads() -> None:
    lengths = lognormal(8000)
    plain = padded_share(lengths, EffectiveBatches(8000, 3), 8, 1000)
    together = padded_share(lengths, EffectiveBatches(8000, 3, grouping=Grouping(lengths, 8)), 8, 1000)
    assert 0.55 < plain < 0.7
    assert together < plain / 3


def test_the_updates_of_a_window_are_in_no_order_of_length_and_each_epoch_has_others() -> None:
    """Sorted by length, a run would use its shortest samples first; with fixed groups, epochs would repeat them."""
    lengths = lognormal(320)
    batches = EffectiveBatches(320, 3, grouping=Grouping(lengths, 8, window=8))
    updates = [batches.next(8) for _ in range(80)]
    means = np.array([lengths[ids].mean() for ids in updates])
    for start in range(0, 80, 8):
        rises = (np.diff(means[start : start + 8]) > 0).sum()
        assert 0 < rises < 7
    assert len({frozenset(ids) for ids in updates}) == 80


def test_the_grouped_order_is_the_one_that_older_checkpoints_were_made_with() -> None:
    """Recorded once, as above."""
    grouping = Grouping(np.array([5, 1, 4, 1, 3, 9, 2, 6, 5, 3, 5, 8, 9]), 3, 2)
    assert grouped(grouping, 7, 0).tolist() == [8, 5, 12, 1, 6, 9, 0, 7, 11, 4, 2, 10, 3]
    assert grouped(grouping, 7, 1).tolist() == [1, 10, 3, 6, 4, 9, 2, 11, 8, 0, 5, 7, 12]


@pytest.mark.parametrize(
    ("lengths", "effective", "window", "sentence"),
    [
        (np.ones((2, 2), int), 1, 1, "lengths must be a one-dimensional array of integers"),
        (np.ones(2), 1, 1, "lengths must be a one-dimensional array of integers"),
        (np.ones(2, int), 0, 1, "effective and window must be at least 1, found 0 and 1"),
        (np.ones(2, int), 1, 0, "effective and window must be at least 1, found 1 and 0"),
    ],
)
def test_an_invalid_grouping_is_refused(lengths: np.ndarray, effective: int, window: int, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Grouping(lengths, effective, window)


def test_a_grouping_of_other_samples_is_refused() -> None:
    with pytest.raises(ValueError, match="lengths has 2 entries for 3 samples"):
        EffectiveBatches(3, 0, grouping=Grouping(np.ones(2, int), 1))


@st.composite
def segments(draw: st.DrawFn) -> tuple[Grouping | None, int, list[tuple[str, int]]]:
    grouping = draw(st.none() | groupings())
    count = draw(counts) if grouping is None else len(grouping.lengths)
    events = st.sampled_from(["update", "update", "update", "checkpoint", "kill", "stop", "resize"])
    return grouping, count, draw(st.lists(st.tuples(events, st.integers(1, 12)), max_size=60))


@given(segments(), seeds, st.data())
def test_kills_and_resizes_change_no_updates_samples(
    case: tuple[Grouping | None, int, list[tuple[str, int]]], seed: int, data: st.DataObject
) -> None:
    """Kills, stops, halvings and growths, with the effective batch kept: what reached the weights for good."""
    grouping, count, events = case
    effective = data.draw(st.integers(1, count))
    batches = EffectiveBatches(count, seed, grouping=grouping)
    size, saved = effective, (0, 0)
    updates: list[list[int]] = []
    for kind, number in events:
        if kind == "update":
            ids = batches.next(effective)
            updates.append([sample for start in range(0, effective, size) for sample in ids[start : start + size]])
        elif kind == "resize":
            size = min(number, effective)
        else:
            if kind != "kill":
                saved = (len(updates), batches.cursor)
            if kind != "checkpoint":
                del updates[saved[0] :]
                batches = EffectiveBatches(count, seed, saved[1], grouping)
    reference = EffectiveBatches(count, seed, grouping=grouping)
    assert updates == [reference.next(effective) for _ in updates]
    taken = [sample for ids in updates for sample in ids]
    for start in range(0, len(taken) - count + 1, count):
        assert sorted(taken[start : start + count]) == list(range(count))
