"""The samples that need the most memory: the longest."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from mlx_worker.task import Task

READ_AT_MOST = 20_000
"""Samples that are read to find the longest, where the task has no `lengths`; evenly spread over the dataset."""
STREAM_READ = 1000
"""Samples that are read of a dataset without a length."""
EXACT_FACTOR = 4
"""`lengths` may be only close to the cost (bytes of text, say): this many times as many candidates are measured."""


class Updates:
    """A dataset of one effective batch, which changes with every update: `batches`, and then the last one again.

    The loop reads each sample of an effective batch once, in any order.
    """

    def __init__(self, batches: Sequence[Sequence[Any]]) -> None:
        self._batches = batches
        self._reads = 0

    def __len__(self) -> int:
        return len(self._batches[0])

    def __getitem__(self, index: int) -> Any:
        update, self._reads = self._reads // len(self), self._reads + 1
        return self._batches[min(update, len(self._batches) - 1)][index]


def spread(task: Task, count: int, batches: int) -> list[list[Any]]:
    """`batches` lists of `count` samples each, as they come: they give the sizes that a run has most of the time."""
    dataset: Any = task.dataset
    samples = len(dataset)
    return [[dataset[(batch * count + place) % samples] for place in range(count)] for batch in range(batches)]


def longest(task: Task, count: int) -> list[Any]:
    """The `count` longest samples of the task's dataset, as far as their length can be known."""
    dataset: Any = task.dataset
    samples = len(dataset)
    count = min(count, samples)
    if task.lengths is not None:
        ids = np.argsort(-np.asarray(task.lengths), kind="stable")[: EXACT_FACTOR * count]
    else:
        ids = np.unique(np.linspace(0, samples - 1, num=max(count, min(samples, READ_AT_MOST))).astype(np.int64))
    ranked = sorted((int(index) for index in ids), key=lambda index: -extent(dataset[index]))
    return [dataset[index] for index in ranked[:count]]


def extent(sample: Any) -> int:
    """A number that grows with a sample's memory: its tokens, or the elements of all its arrays."""
    if hasattr(sample, "size") and not callable(sample.size):
        return int(sample.size)
    if isinstance(sample, str | bytes):
        return len(sample)
    if isinstance(sample, dict):
        return sum(extent(value) for value in sample.values())
    if isinstance(sample, list | tuple):
        return len(sample) if all(isinstance(value, int | float) for value in sample) else sum(map(extent, sample))
    return 1
