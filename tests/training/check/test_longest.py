"""The samples by which `check --measure` finds the highest need: the longest, whatever the data set is."""

from types import SimpleNamespace

import numpy as np

from mlx_worker.check.longest import Updates, longest, spread

SAMPLES = [np.zeros(1 + number * 7 % 50, np.int32) for number in range(50)]


def sizes(samples):
    return [len(sample) for sample in samples]


def test_the_longest_are_found():
    task = SimpleNamespace(dataset=SAMPLES, lengths=None)
    assert sizes(longest(task, 3)) == [50, 49, 48]
    assert sizes(spread(task, 2, 2)[1]) == sizes(SAMPLES[2:4])


def test_lengths_that_are_only_close_to_the_cost_are_enough():
    lengths = [len(sample) + number % 3 for number, sample in enumerate(SAMPLES)]
    assert sizes(longest(SimpleNamespace(dataset=SAMPLES, lengths=lengths), 3)) == [50, 49, 48]


def test_no_more_samples_than_there_are():
    assert len(longest(SimpleNamespace(dataset=SAMPLES[:2], lengths=None), 5)) == 2


def test_each_update_reads_its_own_batch_in_any_order():
    updates = Updates([["a", "b"], ["c", "d"]])
    assert [[updates[1], updates[0]] for _ in range(3)] == [["b", "a"], ["d", "c"], ["d", "c"]]
