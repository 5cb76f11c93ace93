"""What a checkpoint has besides weights and optimizer: averaged weights, the task's state, the place in a stream."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from mlx_worker.checkpoint import rng_state, user_state
from mlx_worker.checkpoint.manifest import AVERAGE, STREAM, TASK_STATE
from mlx_worker.checkpoint.store import LoadedCheckpoint
from mlx_worker.checkpoint.user_state import MoreState
from mlx_worker.data import order, sources
from mlx_worker.data.batches import EffectiveBatches
from mlx_worker.data.sources import SequentialSource, ShuffledSource, Source
from mlx_worker.errors import RefusedError
from mlx_worker.extras.ema import WeightAverage
from mlx_worker.task import Task


class Extras:
    """Made when the weights of `newest`, if there is one, are restored. `source`: where the samples come from.

    Restores the rest of `newest`, and last the random generators, which the task's code may have used. `notes`: on what
    changed. `progress()` is called now and then while samples are skipped. Raises RefusedError, SampleError and errors
    of the task's code.
    """

    def __init__(
        self,
        task: Task,
        newest: LoadedCheckpoint | None,
        batches: Callable[[], EffectiveBatches],
        progress: Callable[[], None],
    ) -> None:
        self._task = task
        self.average = WeightAverage(task)
        self.notes = [] if newest is None else [*self.average.restore(newest), *self._load_state(newest)]
        self.source: Source
        if sources.is_sized(task.dataset):
            self.source = ShuffledSource(task.dataset, batches())
        else:
            self.source = self._sequential(newest, progress)
        if newest is not None:
            rng_state.restore(newest.trainer["rng"])
        self.state()  # what cannot be stored is refused before training

    def state(self) -> MoreState:
        """What the next checkpoint has, between two updates. Raises RefusedError, and errors of the task's code."""
        arrays: dict[str, dict[str, mx.array]] = {}
        trainer: dict[str, Any] = {}
        if self.average.decay is not None:
            arrays[AVERAGE], trainer["ema_decay"] = dict(self.average.arrays), self.average.decay
        if self._task.state is not None:
            trainer["task_state"], arrays[TASK_STATE] = user_state.encode(self._task.state(), "Task.state")
        position = self.source.state()
        if position is not None:
            trainer["stream"] = position
            if sources.keeps_own_position(self._task.dataset) and not self.source.ahead:
                dataset: Any = self._task.dataset
                own = dataset.state_dict()
                position["own"], arrays[STREAM] = user_state.encode(own, "Task.dataset.state_dict")
        return MoreState({file: named for file, named in arrays.items() if named}, trainer)

    def _load_state(self, checkpoint: LoadedCheckpoint) -> list[str]:
        load, saved = self._task.load_state, "task_state" in checkpoint.trainer
        if load is None:
            dropped = f"The task's own state in the checkpoint of step {checkpoint.step} is dropped"
            return [f"{dropped}: Task.load_state is not set."] if saved else []
        if not saved:
            return [f"The checkpoint of step {checkpoint.step} has no state of the task's own: that begins anew."]
        load(user_state.decode(checkpoint.trainer["task_state"], checkpoint.more.get(TASK_STATE, {})))
        return []

    def _sequential(self, newest: LoadedCheckpoint | None, progress: Callable[[], None]) -> SequentialSource:
        dataset: Any = self._task.dataset
        position = None if newest is None else newest.trainer.get("stream")
        if newest is None:
            return SequentialSource(dataset)
        if not isinstance(position, dict):
            raise RefusedError(f"{newest.path}: trainer.json has no position in Task.dataset")
        load = None
        if "own" in position and sources.keeps_own_position(dataset):
            own = user_state.decode(position["own"], newest.more.get(STREAM, {}))

            def load() -> None:
                dataset.load_state_dict(own)

        source = SequentialSource(dataset, position, load, progress)
        if source.skipped:
            self.notes.append(f"Skipped {source.skipped:,} samples of Task.dataset in {source.skip_s:.1f} s to resume.")
        return source


def plan_batches(task: Task, seed: int, cursor: int, facts: dict[str, Any]) -> EffectiveBatches:
    """The shuffled batches of a dataset with a length. Raises what `EffectiveBatches` raises."""
    samples = sources.length_of(task.dataset)
    assert samples is not None
    return EffectiveBatches(samples, seed, cursor, order.grouping(facts["order"], task))
