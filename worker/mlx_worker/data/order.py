"""The order of samples as a fact of a run: decided when it begins, kept in its checkpoints, never changed after."""

import hashlib
from typing import Any

import numpy as np

from mlx_worker.data.batches import WINDOW, Grouping
from mlx_worker.errors import RefusedError
from mlx_worker.task import Task


def decide(task: Task, effective: int) -> dict[str, Any] | None:
    """The order of a run that begins now, ready for JSON; None is the plain shuffle. Raises RefusedError."""
    if task.lengths is None:
        return None
    return {"effective": effective, "window": WINDOW, "lengths_sha256": _digest(_lengths(task))}


def keep(old: dict[str, Any] | None, new: dict[str, Any] | None, where: str) -> dict[str, Any] | None:
    """The order that a resumed run goes on with: that of its checkpoint, whatever it would be today.

    Raises RefusedError when the task cannot give it any more.
    """
    if old is None:
        return None  # grouping would begin in the middle of an epoch, and repeat and skip samples
    if new is None:
        raise RefusedError(f"the samples of {where} were grouped by length, and the task gives no lengths now")
    if old["lengths_sha256"] != new["lengths_sha256"]:
        raise RefusedError(f"the lengths by which the samples of {where} were grouped have changed")
    return old


def grouping(order: dict[str, Any] | None, task: Task) -> Grouping | None:
    """What the stream needs to know. Raises KeyError, TypeError or ValueError for what `decide` did not make."""
    return None if order is None else Grouping(_lengths(task), int(order["effective"]), int(order["window"]))


def _lengths(task: Task) -> np.ndarray[Any, np.dtype[np.int64]]:
    try:
        lengths = np.asarray(task.lengths)
    except ValueError as error:
        raise RefusedError(f"the task's lengths must be one whole number for every sample: {error}") from None
    if lengths.ndim != 1 or lengths.dtype.kind not in "iu" or len(lengths) != len(task.dataset):
        raise RefusedError(
            f"the task's lengths must be one whole number for every one of its {len(task.dataset)} samples, "
            f"found {lengths.dtype} of shape {lengths.shape}"
        )
    return lengths.astype(np.int64)


def _digest(lengths: np.ndarray[Any, np.dtype[np.int64]]) -> str:
    return hashlib.sha256(lengths.astype("<i8").tobytes()).hexdigest()
