"""One thread that writes checkpoints while training goes on, one at a time."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

from mlx_worker.checkpoint.store import SavedCheckpoint
from mlx_worker.supervision.stop import leave_signals_to_the_main_thread


@dataclass(frozen=True)
class Written:
    """How a write ended: `saved`, or the `error`. `at_s`: when, by `time.perf_counter`."""

    saved: SavedCheckpoint | None
    error: Exception | None
    at_s: float


class BackgroundWriter:
    """To be used by one thread; the work is done in another, which is left alone by signals.

    The thread stays, since every thread that uses MLX has a stream of its own. Python waits for it before it exits.
    """

    def __init__(self) -> None:
        self._executor: ThreadPoolExecutor | None = None
        self._future: Future[Written] | None = None

    @property
    def busy(self) -> bool:
        """Whether a write was started whose end has not been collected."""
        return self._future is not None

    def start(self, write: Callable[[], SavedCheckpoint]) -> None:
        """Do `write` in the background. Only when not busy."""
        assert self._future is None, "one write at a time"
        if self._executor is None:
            self._executor = ThreadPoolExecutor(1, "checkpoints", initializer=leave_signals_to_the_main_thread)
        self._future = self._executor.submit(written, write)

    def collect(self, *, waiting: bool = False) -> Written | None:
        """How the write ended, once; None while it goes on (unless `waiting`) and when there is none."""
        if self._future is None:
            return None
        if waiting:
            wait([self._future])
        if not self._future.done():
            return None
        future, self._future = self._future, None
        return future.result()


def written(write: Callable[[], SavedCheckpoint]) -> Written:
    """Do it here and now. Whatever it raises is the outcome: training must not die of a checkpoint that failed."""
    try:
        return Written(write(), None, time.perf_counter())
    except Exception as error:
        return Written(None, error, time.perf_counter())
