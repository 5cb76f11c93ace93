"""The order of a run's samples: fixed by seed and epoch, and by the grouping that the run began with."""

import hashlib
from collections.abc import Sized
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from mlx_worker.errors import ChangedError, RefusedError
from mlx_worker.task import Task

WINDOW = 32
"""Effective batches among which samples are sorted by length. Of lognormal lengths (median 200 tokens, sigma 0.8), in
batches of 8 padded to multiples of 32, padding is 62 % of the computed tokens with a plain shuffle, 29 % with a window
of 8, 14 % with 32, 10 % with 64, and 6 % with all 20,000 samples sorted."""


Ids = npt.NDArray[np.integer]


@dataclass(frozen=True)
class Grouping:
    """Samples of similar length go into one effective batch, so that less is padded.

    `lengths`: of every sample, in any unit that grows with the cost. `effective`: samples of an effective batch when
    the run began; a later size only cuts the same order elsewhere. `window`: effective batches of the shuffled epoch
    that are sorted together.

    Raises ValueError unless `lengths` has one integer per sample and both sizes are at least 1.
    """

    lengths: Ids
    effective: int
    window: int = WINDOW

    def __post_init__(self) -> None:
        if self.lengths.ndim != 1 or self.lengths.dtype.kind not in "iu":
            raise ValueError(
                f"lengths must be a one-dimensional array of integers, found {self.lengths.dtype}{self.lengths.shape}"
            )
        if self.effective < 1 or self.window < 1:
            raise ValueError(f"effective and window must be at least 1, found {self.effective} and {self.window}")


def permutation(count: int, seed: int, epoch: int) -> Ids:
    """The plain order of one epoch: the stable argsort of `count` raw 64-bit words of PCG64.

    numpy guarantees a stable output of SeedSequence and of a bit generator's raw words (NEP 19), but not of
    `Generator.permutation`: an upgrade must not change the order of a checkpoint. `spawn_key` separates all pairs
    (seed, epoch), also for seeds of more than 32 bits.
    """
    order = np.argsort(_words(count, seed, epoch), kind="stable")
    return order.astype(np.uint32 if count <= 2**32 else np.uint64)


def grouped(grouping: Grouping, seed: int, epoch: int) -> Ids:
    """The order of one epoch with samples of similar length together: a permutation that depends only on the arguments.

    Windows of the plain order are sorted by length and cut into effective batches, which are shuffled. An effective
    batch that spans two epochs takes the samples at either end of the plain order: taken from the end of the sorted
    order, one update per epoch would hold only the longest samples.
    """
    lengths, size = grouping.lengths, grouping.effective
    count = len(lengths)
    plain = permutation(count, seed, epoch)
    head = min(-(epoch * count) % size, count)  # completes the last effective batch of the epoch before
    batches = (count - head) // size
    middle = plain[head : head + batches * size]
    windows = np.arange(len(middle)) // (size * grouping.window)
    middle = middle[np.lexsort((lengths[middle], windows))].reshape(batches, size)  # stable: ties keep their order
    shuffled = np.lexsort((_words(batches, seed, epoch, 1), windows[::size]))
    ends = (plain[:head], plain[head + batches * size :])
    first, last = (end[np.argsort(lengths[end], kind="stable")] for end in ends)
    return np.concatenate((first, middle[shuffled].reshape(-1), last))


def _words(count: int, seed: int, *key: int) -> npt.NDArray[np.uint64]:
    words: npt.NDArray[np.uint64] = np.random.PCG64(np.random.SeedSequence(seed, spawn_key=key)).random_raw(count)
    return words


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
        raise ChangedError(f"Task.lengths is missing, but {where} has it; put it back, or begin anew with --fresh.")
    if old["lengths_sha256"] != new["lengths_sha256"]:
        raise ChangedError(f"Task.lengths differs from that of {where}; put it back, or begin anew with --fresh.")
    return old


def grouping(order: dict[str, Any] | None, task: Task) -> Grouping | None:
    """The grouping for the stream. Raises KeyError, TypeError or ValueError for an `order` not made by `decide`."""
    return None if order is None else Grouping(_lengths(task), int(order["effective"]), int(order["window"]))


def _lengths(task: Task) -> np.ndarray[Any, np.dtype[np.int64]]:
    samples = len(cast(Sized, task.dataset))  # tasks with lengths and without len() are refused
    try:
        lengths = np.asarray(task.lengths)
    except ValueError as error:
        raise RefusedError(f"Task.lengths: expected one whole number per sample: {error}") from None
    if lengths.ndim != 1 or lengths.dtype.kind not in "iu" or len(lengths) != samples:
        raise RefusedError(
            f"Task.lengths: expected one whole number for each of the {samples} samples, "
            f"found {lengths.dtype} of shape {lengths.shape}"
        )
    return lengths.astype(np.int64)


def _digest(lengths: np.ndarray[Any, np.dtype[np.int64]]) -> str:
    return hashlib.sha256(lengths.astype("<i8").tobytes()).hexdigest()
