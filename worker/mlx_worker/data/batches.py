"""The samples of each update: a fixed order, cut into effective batches, that no restart changes."""

import operator

from mlx_worker.data.order import Grouping, Ids, grouped, permutation


class EffectiveBatches:
    """Effective batches of sample ids, cut one after another from an endless stream.

    The stream is the concatenation of epochs; epoch e is a permutation of `range(sample_count)` that depends only on
    (seed, e) and on the grouping that the run began with. `cursor` counts the samples taken since the start of
    training: a new stream at the same cursor continues exactly where the old one ended, whatever the batch sizes were.

    Raises ValueError for an empty dataset, a negative seed or cursor, or a grouping of another size; TypeError for
    arguments that are not integers.
    """

    def __init__(self, sample_count: int, seed: int, cursor: int = 0, grouping: Grouping | None = None) -> None:
        self._count = _integer("sample_count", sample_count)
        self._grouping = grouping
        if grouping is not None and len(grouping.lengths) != self._count:
            raise ValueError(f"lengths has {len(grouping.lengths)} entries for {self._count} samples")
        if self._count == 0:
            raise ValueError("the dataset is empty; at least 1 sample is needed")
        self._seed = _integer("seed", seed)
        self._cursor = _integer("cursor", cursor)
        self._permutation: Ids | None = None
        self._permuted_epoch = -1

    @property
    def cursor(self) -> int:
        """Samples taken in total."""
        return self._cursor

    @property
    def epoch(self) -> int:
        """The epoch of the next sample, from 0."""
        return self._cursor // self._count

    def next(self, effective: int) -> list[int]:
        """The ids of the next `effective` samples; the cursor advances by as many.

        A batch may span two epochs. Raises ValueError if it is larger than the dataset: it would always repeat a
        sample.
        """
        effective = _integer("effective", effective)
        if effective < 1:
            raise ValueError("an effective batch must have at least 1 sample, found 0")
        if effective > self._count:
            raise ValueError(
                f"the effective batch of {effective} samples exceeds the dataset's {self._count}; "
                "lower the batch size or the accumulation, or add data"
            )
        ids: list[int] = []
        while len(ids) < effective:
            epoch, offset = divmod(self._cursor, self._count)
            part = self._order(epoch)[offset : offset + effective - len(ids)].tolist()
            ids += part
            self._cursor += len(part)
        return ids

    def _order(self, epoch: int) -> Ids:
        if self._permutation is None or self._permuted_epoch != epoch:
            self._permutation = None  # freed before the new one is made
            if self._grouping is None:
                self._permutation = permutation(self._count, self._seed, epoch)
            else:
                self._permutation = grouped(self._grouping, self._seed, epoch)
            self._permuted_epoch = epoch
        return self._permutation


def _integer(name: str, value: object) -> int:
    if isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, found {value!r}")
    try:
        number = operator.index(value)  # type: ignore[arg-type]  # this is the check
    except TypeError:
        raise TypeError(f"{name} must be an integer, found {value!r:.80}") from None
    if number < 0:
        raise ValueError(f"{name} must not be negative, found {number}")
    return number
