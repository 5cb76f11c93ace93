"""An exponential moving average of the trained weights."""

import contextlib
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from mlx_worker.checkpoint.manifest import AVERAGE
from mlx_worker.checkpoint.store import LoadedCheckpoint
from mlx_worker.errors import RefusedError
from mlx_worker.task import Task


class WeightAverage:
    """The average of the trainable parameters: `average += (1 - decay) * (weights - average)` after every update.

    It begins with the weights, and is float32 whatever the weights are: in bfloat16, a decay of 0.999 would round most
    changes away. Without `Task.ema_decay` it is off: `arrays` is empty and every method does nothing.
    """

    def __init__(self, task: Task) -> None:
        self.decay = task.ema_decay
        self._model = task.model
        self.arrays: dict[str, mx.array] = {}
        """Changed in place: compiled functions refer to it."""
        self._begin()

    def _begin(self) -> None:
        if self.decay is not None:
            self.arrays.update({name: value.astype(mx.float32) for name, value in self._weights().items()})
            mx.eval(self.arrays)

    def update(self) -> None:
        """Take the current weights in."""
        if self.decay is None:
            return
        share = 1.0 - self.decay
        for name, value in self._weights().items():
            average = self.arrays[name]
            self.arrays[name] = average + share * (value.astype(mx.float32) - average)

    @contextlib.contextmanager
    def in_model(self) -> Iterator[None]:
        """Within it, the model has the averaged weights, in their own type."""
        if self.decay is None:
            yield
            return
        weights = self._weights()
        averaged = {name: self.arrays[name].astype(value.dtype) for name, value in weights.items()}
        mx.eval(averaged)
        self._model.update(tree_unflatten(list(averaged.items())))
        try:
            yield
        finally:
            self._model.update(tree_unflatten(list(weights.items())))

    def restore(self, checkpoint: LoadedCheckpoint) -> list[str]:
        """The checkpoint's average; returns notes on changes. Call it when the weights are restored."""
        saved, old = checkpoint.more.get(AVERAGE), checkpoint.trainer.get("ema_decay")
        if self.decay is None:
            dropped = f"The averaged weights are dropped, from step {checkpoint.step + 1}: ema_decay is off."
            return [] if saved is None else [dropped]
        if saved is None:
            self._begin()
            begins = f"Averaging of the weights begins with those of step {checkpoint.step}"
            return [f"{begins} (ema_decay = {self.decay:g})."]
        if {name: value.shape for name, value in saved.items()} != {
            name: value.shape for name, value in self.arrays.items()
        }:
            raise RefusedError(f"checkpoint {checkpoint.path}: {AVERAGE} does not fit the task's trainable parameters")
        self.arrays.update(saved)
        if old == self.decay:
            return []
        return [f"ema_decay changed: {old} → {self.decay:g}, from step {checkpoint.step + 1}."]

    def _weights(self) -> dict[str, mx.array]:
        pairs: Any = tree_flatten(self._model.trainable_parameters())
        return dict(pairs)
