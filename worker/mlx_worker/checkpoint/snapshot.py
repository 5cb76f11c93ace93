"""The run's state between two updates, to be written while training continues."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from mlx_worker.checkpoint import training_state
from mlx_worker.checkpoint.user_state import MoreState
from mlx_worker.task import Task


@dataclass(frozen=True)
class Snapshot:
    """The content of a checkpoint. Later training does not change it."""

    step: int
    trained: Mapping[str, mx.array]
    optimizer: Mapping[str, mx.array]
    trainer: Mapping[str, Any]
    more: Mapping[str, Mapping[str, mx.array]] = field(default_factory=dict)


def take(
    progress: training_state.Progress,
    epoch: int,
    facts: dict[str, Any],
    task: Task,
    best: dict[str, Any] | None = None,
    *,
    in_background: bool = True,
    more: MoreState | None = None,
) -> Snapshot:
    """The state now, on the training thread: weights, optimizer, random generators and cursor of the same moment.

    Where the processor reads the device's memory (the CPU, Metal) nothing is copied: MLX's arrays never change, an
    update makes new ones, and never reuses the buffer of an array with other references. Without `in_background`,
    training pauses for the write, and nothing is copied either: there may be no room for a copy.
    """
    copied = in_background and not shared_memory()
    trained = _held(training_state.trained_arrays(task), copied=copied)
    optimizer = _held(training_state.optimizer_arrays(task), copied=copied)
    more = more or MoreState()
    more_arrays = {name: _held(dict(arrays), copied=copied) for name, arrays in more.arrays.items()}
    mx.eval(trained, optimizer, more_arrays)
    facts = copy.deepcopy(facts)  # a resize changes them in place
    state = training_state.trainer_state(progress, epoch, facts, task)
    state |= {**more.trainer, **({} if best is None else {"best": best})}
    return Snapshot(progress.step, trained, optimizer, state, more_arrays)


def size_bytes(task: Task, more: MoreState | None = None) -> int:
    """Extra memory that a snapshot keeps alive: one more copy of weights, optimizer state and `more`."""
    arrays = [*training_state.trained_arrays(task).values(), *training_state.optimizer_arrays(task).values()]
    return sum(array.nbytes for array in arrays) + (0 if more is None else more.size_bytes)


def shared_memory() -> bool:
    """Whether processor and device share memory: always, except with CUDA."""
    return mx.default_device() == mx.Device(mx.cpu) or mx.metal.is_available()


def _held(arrays: dict[str, mx.array], *, copied: bool) -> dict[str, mx.array]:
    """New references to the same buffers: assignment to part of an array rebinds the Python object in place.

    Row-contiguous, so that writing needs no kernel. With CUDA's own memory a copy instead: a read from the processor
    moves the buffer while kernels still use it.
    """
    if not copied:
        return {name: mx.contiguous(array) for name, array in arrays.items()}
    return {name: mx.where(mx.array(True), array, array) for name, array in arrays.items()}
