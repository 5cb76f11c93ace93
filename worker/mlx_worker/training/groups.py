"""Gradient accumulation as in mlx_lm: the mean of the means of equal groups, whatever their numbers of tokens."""

from typing import Any

import mlx.core as mx
from mlx.utils import tree_map

from mlx_supervisor import wire
from mlx_worker.task import Task


def group_of(job: wire.Job, task: Task) -> int | None:
    """Samples of a group: the configured micro-batch, whatever it is now. None: every sample has its own weight."""
    return (job.batch.requested_size or task.batch_size) if job.task.mlx_lm_compatible else None


def cut(ids: list[int], size: int, group: int | None) -> list[tuple[list[int], bool]]:
    """The micro-batches of an update, of at most `size` samples, and whether each ends its group.

    Without groups none does. A micro-batch never spans two groups.
    """
    if group is None:
        return [(ids[start : start + size], False) for start in range(0, len(ids), size)]
    parts = []
    for first in range(0, len(ids), group):
        members = ids[first : first + group]
        starts = range(0, len(members), size)
        parts += [(members[start : start + size], start + size >= len(members)) for start in starts]
    return parts


def mean_of(sums: Any) -> Any:
    """A group's means from its sums by weight, `(loss, weight, …)`; zeros if it has no weight, where mlx_lm has NaN."""
    loss, weight, *rest = sums
    total = mx.where(weight > 0, weight, 1.0)
    loss, *rest = tree_map(lambda value: value / total, [loss, *rest])
    return loss, weight, *rest


def without_nan(means: Any) -> Any:
    """Means of a group in one micro-batch, `(loss, weight, …)`; a loss without weight counts as zero."""
    loss, weight, *rest = means
    return mx.where(weight > 0, loss, 0.0), weight, *rest


def added(groups: Any, means: Any) -> Any:
    """The sums of the groups' means, of all their weights."""
    return tree_map(mx.add, groups, means)


def mean_of_groups(groups: Any, count: mx.array) -> Any:
    """The mean over `count` groups; the weight stays the sum."""
    loss, weight, *rest = groups
    loss, *rest = tree_map(lambda value: value / count, [loss, *rest])
    return loss, weight, *rest
