"""Where the samples of an update come from: a dataset with a length, one without, or a stream."""

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from mlx_worker.data.batches import EffectiveBatches
from mlx_worker.errors import RefusedError

ALLOWED = "a dataset with len() and [index], with [index] alone, or an iterable with a fixed order"
PROGRESS_EVERY_S = 5.0
"""Interval of the reports while samples are skipped."""


class SampleError(RuntimeError):
    """The task's dataset failed at a sample; the text names the sample, the cause is the dataset's own error."""


class DataEndedError(RefusedError):
    """There are too few samples for the next update. The updates before it can be saved."""


class Source(Protocol):
    """The samples in the order of training. `cursor` counts those taken since the start of the run."""

    @property
    def cursor(self) -> int: ...

    @property
    def epoch(self) -> int:
        """The epoch of the next sample; of a stream, of the latest one, as its end is not known yet."""

    def next(self, effective: int) -> tuple[int, list[int]]:
        """The next `effective` samples: the first one's epoch, and their indexes in the dataset or the stream."""

    def load(self, ids: list[int]) -> list[Any]:
        """The samples with the next ids. Raises SampleError."""

    def state(self) -> dict[str, Any] | None:
        """The position for the checkpoint, with every sample of `next` taken; None if `cursor` is enough."""

    @property
    def ahead(self) -> bool:
        """Whether the dataset was read beyond that position, as `next` failed."""


def length_of(dataset: Any) -> int | None:
    """The number of samples; None for a dataset without a length, or without random access."""
    return len(dataset) if is_sized(dataset) else None


def is_sized(dataset: Any) -> bool:
    """Whether the order of samples is shuffled by the supervisor: the dataset has len() and [index]."""
    return hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")


def head_of(dataset: Any, count: int) -> list[Any]:
    """The first `count` samples of a dataset without a length, or fewer; a generator can't be read again."""
    return list(itertools.islice(_in_order(dataset, 0), count))


def is_usable(dataset: Any) -> bool:
    """Whether it is one of the allowed kinds. The order of a set may differ at the next start."""
    return not isinstance(dataset, set | frozenset) and (
        hasattr(dataset, "__getitem__") or hasattr(dataset, "__iter__")
    )


def keeps_own_position(dataset: Any) -> bool:
    """Whether it is a stream that saves and restores its own position."""
    own = callable(getattr(dataset, "state_dict", None)) and callable(getattr(dataset, "load_state_dict", None))
    return own and not _by_index(dataset)


def _by_index(dataset: Any) -> bool:
    """Of one without a length. Torch's streams inherit an [index] that only raises."""
    return hasattr(dataset, "__getitem__") and not hasattr(dataset, "__iter__")


class ShuffledSource:
    """A dataset with a length, in the order of `EffectiveBatches`."""

    def __init__(self, dataset: Any, batches: EffectiveBatches) -> None:
        self._dataset, self._batches = dataset, batches

    @property
    def cursor(self) -> int:
        return self._batches.cursor

    @property
    def epoch(self) -> int:
        return self._batches.epoch

    def next(self, effective: int) -> tuple[int, list[int]]:
        return self._batches.epoch, self._batches.next(effective)

    def load(self, ids: list[int]) -> list[Any]:
        return [self._sample(index) for index in ids]

    def _sample(self, index: int) -> Any:
        with _naming(f"Task.dataset[{index}]"):
            return self._dataset[index]

    def state(self) -> dict[str, Any] | None:
        return None

    @property
    def ahead(self) -> bool:
        return False


class SequentialSource:
    """A dataset without a length, in its own order, epoch after epoch.

    With `[index]` and without `iter`: indexes 0, 1, 2, … until IndexError. Otherwise a stream: `iter(dataset)`, once
    per epoch. `dataset.set_epoch(epoch)` is called before each epoch if the dataset has it. Nothing is taken ahead of
    `next`, so between updates the dataset's own position is that of the last update's last sample.

    `position`: from a checkpoint, as `state` returned it, to resume there. `load_position` restores the dataset's own
    position; without it, the samples taken in this epoch are skipped, and `progress()` is called while they are.
    Raises RefusedError for a dataset without samples, or with fewer than `position` says; SampleError.
    """

    def __init__(
        self,
        dataset: Any,
        position: dict[str, Any] | None = None,
        load_position: Callable[[], None] | None = None,
        progress: Callable[[], None] = lambda: None,
    ) -> None:
        self._dataset = dataset
        self._ready: list[_Taken] = []
        self._position = position or {"cursor": 0, "epoch": 0, "offset": 0}
        self._reading, self._offset = int(self._position["epoch"]), int(self._position["offset"])
        self._length = 0
        self._set_epoch()
        if load_position is not None:
            load_position()
        self._iterator = _in_order(dataset, self._offset)
        self.skipped, self.skip_s = 0, 0.0
        if position is None:
            self._ready.append(self._take())  # an empty dataset is refused before training
            self._position["offset"] = self._offset
        elif load_position is None and not _by_index(dataset):
            self._skip(self._offset, progress)

    @property
    def cursor(self) -> int:
        return int(self._position["cursor"])

    @property
    def epoch(self) -> int:
        return int(self._position["epoch"])

    def next(self, effective: int) -> tuple[int, list[int]]:
        indexes = {each.index for each in self._ready}
        while len(self._ready) < effective:
            taken = self._take()
            if taken.index in indexes:
                raise DataEndedError(
                    f"the effective batch of {effective} samples exceeds the {self._length} samples that Task.dataset "
                    "has in an epoch; lower the batch size or the accumulation, or add data"
                )
            indexes.add(taken.index)
            self._ready.append(taken)
        self._position = {"cursor": self.cursor + effective, "epoch": self._reading, "offset": self._offset}
        return self._ready[0].epoch, [each.index for each in self._ready]

    def load(self, ids: list[int]) -> list[Any]:
        taken, self._ready = self._ready[: len(ids)], self._ready[len(ids) :]
        return [each.sample for each in taken]

    def state(self) -> dict[str, Any] | None:
        return dict(self._position)

    @property
    def ahead(self) -> bool:
        return (self._reading, self._offset) != (self._position["epoch"], self._position["offset"])

    def _take(self) -> "_Taken":
        """The next sample; at the end of an epoch, the first of the next one."""
        taken = self._read()
        if taken is None:
            if self._offset == 0:
                raise DataEndedError(self._why_empty())
            if self._length == 0:
                print(f"note: epoch {self._reading} of Task.dataset ended after {self._offset:,} samples")
            self._reading, self._length, self._offset = self._reading + 1, self._offset, 0
            self._set_epoch()
            self._iterator = _in_order(self._dataset, 0)
            taken = self._read()
        if taken is None:
            raise DataEndedError(self._why_empty())
        return taken

    def _read(self) -> "_Taken | None":
        with _naming(f"Task.dataset, sample {self._offset} of epoch {self._reading}"):
            for sample in self._iterator:
                self._offset += 1
                return _Taken(self._reading, self._offset - 1, sample)
        return None

    def _why_empty(self) -> str:
        if self._reading == 0:
            return "Task.dataset is empty; at least 1 sample is needed"
        return (
            f"Task.dataset gave {self._length:,} samples in epoch {self._reading - 1} and none in epoch "
            f"{self._reading}: its __iter__ must begin anew at every call, which a generator's does not"
        )

    def _set_epoch(self) -> None:
        if callable(getattr(self._dataset, "set_epoch", None)):
            self._dataset.set_epoch(self._reading)

    def _skip(self, count: int, progress: Callable[[], None]) -> None:
        started_s = reported_s = time.monotonic()
        self._offset = 0
        while self._offset < count:
            if self._read() is None:
                raise RefusedError(
                    f"Task.dataset has {self._offset:,} samples in epoch {self._reading}, but the checkpoint was made "
                    f"after {count:,}; restore the data, or use a new run name"
                )
            if time.monotonic() - reported_s > PROGRESS_EVERY_S:
                reported_s = time.monotonic()
                progress()
        self.skipped, self.skip_s = count, time.monotonic() - started_s


def _in_order(dataset: Any, start: int) -> Iterator[Any]:
    """One epoch's samples; `start`: the first index where there is one."""
    if not _by_index(dataset):
        yield from dataset
        return
    for index in itertools.count(start):
        try:
            sample = dataset[index]
        except IndexError:
            return
        yield sample


@dataclass(frozen=True)
class _Taken:
    epoch: int
    index: int
    sample: Any


@contextlib.contextmanager
def _naming(sample: str) -> Iterator[None]:
    """Names the sample in an error of the dataset's code; the place in that code stays."""
    try:
        yield
    except (MemoryError, RefusedError):
        raise
    except Exception as error:
        text = f"{sample} failed: {type(error).__name__}: {error}"
        raise SampleError(text).with_traceback(error.__traceback__) from error
