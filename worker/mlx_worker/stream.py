"""Which samples an update learns from: a fixed order, cut into effective batches, that no restart changes."""

import operator

import numpy as np
import numpy.typing as npt


class EffectiveBatches:
    """Effective batches of sample ids, cut one after another from an endless stream.

    The stream is the concatenation of epochs; epoch e is a permutation of `range(sample_count)` that depends on
    (seed, e) and on nothing else. `cursor` counts the samples taken since the start of training, so that a stream made
    anew at the same cursor goes on exactly where the old one stood, whatever the batch sizes were before.

    Raises ValueError for an empty dataset, a negative seed or a negative cursor, TypeError for what is no integer.
    """

    def __init__(self, sample_count: int, seed: int, cursor: int = 0) -> None:
        self._count = _integer("sample_count", sample_count)
        if self._count == 0:
            raise ValueError("the dataset is empty: there is no sample to train on")
        self._seed = _integer("seed", seed)
        self._cursor = _integer("cursor", cursor)
        self._permutation: npt.NDArray[np.integer] | None = None
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
        """The ids of the next `effective` samples; the cursor moves on by as many.

        A batch may run over the border of two epochs. Raises ValueError when it is larger than the dataset: it would
        hold some sample more than once by design.
        """
        effective = _integer("effective", effective)
        if effective < 1:
            raise ValueError("an effective batch has at least 1 sample, 0 were asked for")
        if effective > self._count:
            raise ValueError(
                f"an effective batch of {effective} samples is larger than the dataset, which has {self._count}: "
                "lower the batch size or the accumulation, or bring more data"
            )
        ids: list[int] = []
        while len(ids) < effective:
            epoch, offset = divmod(self._cursor, self._count)
            part = self._order(epoch)[offset : offset + effective - len(ids)].tolist()
            ids += part
            self._cursor += len(part)
        return ids

    def _order(self, epoch: int) -> npt.NDArray[np.integer]:
        if self._permutation is None or self._permuted_epoch != epoch:
            self._permutation = None  # the old one goes before the new one comes
            self._permutation = permutation(self._count, self._seed, epoch)
            self._permuted_epoch = epoch
        return self._permutation


def permutation(count: int, seed: int, epoch: int) -> npt.NDArray[np.integer]:
    """The order of one epoch: the stable argsort of `count` raw 64-bit words of PCG64.

    numpy keeps the output of SeedSequence and of a bit generator's raw words the same for good (NEP 19), but not that
    of `Generator.permutation`: a checkpoint must not meet another order after an upgrade. `spawn_key` keeps every
    pair (seed, epoch) apart, for seeds of more than 32 bits too.
    """
    generator = np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(epoch,)))
    order = np.argsort(generator.random_raw(count), kind="stable")
    return order.astype(np.uint32 if count <= 2**32 else np.uint64)


def _integer(name: str, value: object) -> int:
    if isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, found {value!r}")
    try:
        number = operator.index(value)  # type: ignore[arg-type]  # the point is to ask
    except TypeError:
        raise TypeError(f"{name} must be an integer, found {value!r:.80}") from None
    if number < 0:
        raise ValueError(f"{name} must not be negative, found {number}")
    return number
