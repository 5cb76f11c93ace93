"""The run's state at one moment between two updates, to be written while training goes on."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_worker.checkpoint import training_state
from mlx_worker.task import Task


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint is made of. Nothing that training does later changes it."""

    step: int
    trained: Mapping[str, mx.array]
    optimizer: Mapping[str, mx.array]
    trainer: Mapping[str, Any]


def take(
    progress: training_state.Progress,
    epoch: int,
    facts: dict[str, Any],
    task: Task,
    best: dict[str, Any] | None = None,
    *,
    aside: bool = True,
) -> Snapshot:
    """The state now, on the thread that trains: weights, optimizer, random generators and cursor of the same moment.

    Where the processor reads the device's memory (the CPU, Metal) nothing is copied: MLX's arrays never change, an
    update makes new ones, and does not take over the buffer of one that somebody else refers to. Nor is it where
    training stands still meanwhile (`aside` False), which may be because there is no room for a copy.
    """
    copied = aside and not shared_memory()
    trained = _held(training_state.trained_arrays(task), copied=copied)
    optimizer = _held(training_state.optimizer_arrays(task), copied=copied)
    mx.eval(trained, optimizer)
    state = training_state.trainer_state(
        progress, epoch, copy.deepcopy(facts), task
    )  # a resize changes the facts in place
    return Snapshot(progress.step, trained, optimizer, state | ({} if best is None else {"best": best}))


def size_bytes(task: Task) -> int:
    """What a snapshot keeps alive besides what training holds: the weights and the optimizer's state once more."""
    arrays = [*training_state.trained_arrays(task).values(), *training_state.optimizer_arrays(task).values()]
    return sum(array.nbytes for array in arrays)


def shared_memory() -> bool:
    """Whether processor and device have one memory: always, but with CUDA."""
    return mx.default_device() == mx.Device(mx.cpu) or mx.metal.is_available()


def _held(arrays: dict[str, mx.array], *, copied: bool) -> dict[str, mx.array]:
    """References of our own to the same buffers: assignment to part of an array rebinds the Python object in place.

    In rows, so that writing them needs no kernel. With CUDA's own memory a copy instead: reading it from the processor
    moves the buffer away from under the kernels that still use it.
    """
    if not copied:
        return {name: mx.contiguous(array) for name, array in arrays.items()}
    return {name: mx.where(mx.array(True), array, array) for name, array in arrays.items()}
