"""When MLX's cache is cleared, and what its counters say."""

import contextlib
import gc
import time
from dataclasses import dataclass

import mlx.core as mx
import psutil

from mlx_supervisor import wire


@dataclass(frozen=True)
class Counters:
    """Bytes: MLX's own counters, and the resident set of this process."""

    active_bytes: int
    cache_bytes: int
    peak_bytes: int
    resident_bytes: int


class Memory:
    """The job's clearing points; a pause after each lets the system take the memory back."""

    def __init__(self, job: wire.MemoryJob) -> None:
        self._job = job
        self._process = psutil.Process()
        if job.cache_limit_bytes is not None:
            mx.set_cache_limit(job.cache_limit_bytes)
        wired_bytes = mx.device_info().get("max_recommended_working_set_size")
        if wired_bytes is not None:  # Metal only; as mlx_lm's trainer does
            mx.set_wired_limit(int(wired_bytes))

    @property
    def splits_update(self) -> bool:
        """Whether the gradients are to be evaluated on their own, so that there is something to clear after them."""
        return self._job.clear_after_gradients

    def before_gradients(self) -> None:
        """Before the first forward pass of an update."""
        if self._job.clear_before_gradients:
            self._clear()

    def after_gradients(self) -> None:
        """Once a micro-batch's gradients are evaluated and its activations are gone."""
        if self._job.clear_after_gradients:
            self._clear()

    def after_update(self) -> None:
        """Once the new weights are evaluated and the gradients dropped."""
        if self._job.clear_after_update:
            self._clear()

    def relieve(self) -> Counters:
        """All that can be given back at once: Python's garbage, then MLX's cache."""
        gc.collect()
        self._clear()
        return self.read()

    def start_peak(self) -> None:
        """Peak counts from here."""
        mx.reset_peak_memory()

    def read(self) -> Counters:
        """The counters now."""
        resident_bytes = 0
        with contextlib.suppress(psutil.Error):
            resident_bytes = self._process.memory_info().rss
        return Counters(mx.get_active_memory(), mx.get_cache_memory(), mx.get_peak_memory(), resident_bytes)

    def _clear(self) -> None:
        mx.clear_cache()
        if self._job.release_pause_s:
            time.sleep(self._job.release_pause_s)
