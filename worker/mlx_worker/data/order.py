"""The order of a run's samples: decided when the run begins, kept in its checkpoints, never changed."""

import hashlib
from typing import Any

import numpy as np

from mlx_worker.data.batches import WINDOW, Grouping
from mlx_worker.errors import RefusedError
from mlx_worker.task import Task


def decide(task: Task, effective: int) -> dict[str, Any] | None:
    """The order of a new run, ready for JSON; None is the plain shuffle. Raises RefusedError."""
    if task.lengths is None:
        return None
    return {"effective": effective, "window": WINDOW, "lengths_sha256": _digest(_lengths(task))}


def keep(old: dict[str, Any] | None, new: dict[str, Any] | None, where: str) -> dict[str, Any] | None:
    """The order of a resumed run: always that of its checkpoint, `old`.

    `where`: the checkpoint. Raises RefusedError if the task's lengths no longer give this order.
    """
    if old is None:
        return None  # grouping from the middle of an epoch on would repeat and skip samples
    if new is None:
        raise RefusedError(f"Task.lengths is missing, but {where} has it; restore it, or use a new run name")
    if old["lengths_sha256"] != new["lengths_sha256"]:
        raise RefusedError(f"Task.lengths differs from that of {where}; restore it, or use a new run name")
    return old


def grouping(order: dict[str, Any] | None, task: Task) -> Grouping | None:
    """The grouping for the stream. Raises KeyError, TypeError or ValueError for an `order` not made by `decide`."""
    return None if order is None else Grouping(_lengths(task), int(order["effective"]), int(order["window"]))


def _lengths(task: Task) -> np.ndarray[Any, np.dtype[np.int64]]:
    try:
        lengths = np.asarray(task.lengths)
    except ValueError as error:
        raise RefusedError(f"Task.lengths: expected one whole number per sample: {error}") from None
    if lengths.ndim != 1 or lengths.dtype.kind not in "iu" or len(lengths) != len(task.dataset):
        raise RefusedError(
            f"Task.lengths: expected one whole number for each of the {len(task.dataset)} samples, "
            f"found {lengths.dtype} of shape {lengths.shape}"
        )
    return lengths.astype(np.int64)


def _digest(lengths: np.ndarray[Any, np.dtype[np.int64]]) -> str:
    return hashlib.sha256(lengths.astype("<i8").tobytes()).hexdigest()
