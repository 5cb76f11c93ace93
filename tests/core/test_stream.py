"""The order of samples: what a user would lose is a sample skipped or learned twice after a restart or a halving."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_worker.stream import EffectiveBatches, permutation

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
def test_a_stream_made_anew_at_the_cursor_goes_on_where_the_old_one_stood(
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
    with pytest.raises(ValueError, match="an effective batch of 5 samples is larger than the dataset, which has 4"):
        batches.next(5)
    with pytest.raises(ValueError, match="at least 1 sample"):
        batches.next(0)
    assert batches.cursor == 0


@pytest.mark.parametrize("wrong", [1.5, "8", None, True])
def test_a_wrong_type_is_refused(wrong: object) -> None:
    with pytest.raises(TypeError, match="must be an integer, found"):
        EffectiveBatches(10, 0).next(wrong)  # type: ignore[arg-type]
