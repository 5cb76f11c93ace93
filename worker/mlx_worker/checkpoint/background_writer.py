"""One thread that writes checkpoints during training, one at a time."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

from mlx_worker.checkpoint.store import SavedCheckpoint
from mlx_worker.supervision.stop import leave_signals_to_the_main_thread


@dataclass(frozen=True)
class Written:
    """The result of a write: `saved`, or the `error`. `at_s`: its end, by `time.perf_counter`."""

    saved: SavedCheckpoint | None
    error: Exception | None
    at_s: float


class BackgroundWriter:
    """Use from one thread; another thread, with signals blocked, does the writing.

    The thread is kept, since every thread that uses MLX has its own stream. Python waits for it before it exits.
    """

    def __init__(self) -> None:
        self._executor: ThreadPoolExecutor | None = None
        self._future: Future[Written] | None = None

    @property
    def busy(self) -> bool:
        """Whether a write was started and its result not yet collected."""
        return self._future is not None

    def start(self, write: Callable[[], SavedCheckpoint]) -> None:
        """Run `write` in the background. Only when not busy."""
        assert self._future is None, "one write at a time"
        if self._executor is None:
            self._executor = ThreadPoolExecutor(1, "checkpoints", initializer=leave_signals_to_the_main_thread)
        self._future = self._executor.submit(written, write)

    def collect(self, *, waiting: bool = False) -> Written | None:
        """The result of the write, once; None while it runs (unless `waiting`) and without a write."""
        if self._future is None:
            return None
        if waiting:
            wait([self._future])
        if not self._future.done():
            return None
        future, self._future = self._future, None
        return future.result()


def written(write: Callable[[], SavedCheckpoint]) -> Written:
    """Run `write` on this thread. Its exception is part of the result: a failed checkpoint must not end training."""
    try:
        return Written(write(), None, time.perf_counter())
    except Exception as error:
        return Written(None, error, time.perf_counter())
