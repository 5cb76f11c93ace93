"""When MLX's cache is cleared or limited, and MLX's memory counters."""

import gc
import time
from dataclasses import dataclass

import mlx.core as mx

from mlx_supervisor import wire
from mlx_worker.memory.cache_budget import DEVICE_SHARE, REVIEW_EVERY_STEPS, CacheBudget
from mlx_worker.memory.device import Device, countable_bytes
from mlx_worker.memory.own_footprint import OwnFootprint

ROOM_SHARE = 0.9
"""Of the memory limit: `has_room` keeps the rest free, as need varies from update to update."""


@dataclass(frozen=True)
class Counters:
    """Bytes: MLX's own counters, the resident set of this process, its footprint (`own_footprint`), and what all
    processes leave of a device's own memory (None: it has none, or it was not read)."""

    active_bytes: int
    cache_bytes: int
    peak_bytes: int
    resident_bytes: int
    process_bytes: int = 0
    device_free_bytes: int | None = None


class CachePolicy:
    """The job's `memory.policy`: "always" clears the cache at fixed points, "adaptive" limits its size."""

    def __init__(self, job: wire.MemoryJob) -> None:
        self._job = job
        self._always = job.policy == "always"
        self._own = OwnFootprint()
        self._peak_before_bytes = 0
        self._updates = 0
        self.device = Device()
        self.device_limit_bytes = self.device.limit_bytes(job) or 0
        """Of a device with its own memory, else 0."""
        self._budget = self._new_budget() if job.policy == "adaptive" else None
        if job.cache_limit_bytes is not None:
            mx.set_cache_limit(job.cache_limit_bytes)
        if self._budget is not None and self.device.enforces:
            mx.set_memory_limit(self._budget.room_bytes)
        elif self.device_limit_bytes:  # whatever the policy, the cache gives way before the limit
            mx.set_memory_limit(int(DEVICE_SHARE * countable_bytes(self.device_limit_bytes)))
        if self.device.wired_bytes is not None:  # Metal only; as mlx_lm's trainer does
            mx.set_wired_limit(self.device.wired_bytes)

    def _new_budget(self) -> CacheBudget | None:
        limit_bytes, device = self._limit_bytes(), self.device
        if limit_bytes is None:
            return None
        limit_bytes = countable_bytes(self.device_limit_bytes) or limit_bytes
        return CacheBudget(limit_bytes, own=device.own_bytes is not None, enforced=device.enforces)

    def _limit_bytes(self) -> int | None:
        """Of the memory that holds MLX's buffers; None without a limit."""
        job, device = self._job, self.device
        if device.own_bytes is not None:
            return self.device_limit_bytes
        if job.limit_bytes is not None and device.wired_bytes is not None:
            return min(job.limit_bytes, device.wired_bytes)
        return job.limit_bytes

    def has_room(self, more_bytes: int) -> bool:
        """Whether arrays of that size can be kept through the next update, if it needs as much as the last one.

        The cache is not counted: it is trimmed first.
        """
        limit_bytes = self._limit_bytes()
        if limit_bytes is None:
            return True
        counters = self.read()
        other_bytes = 0 if self.device.own_bytes is not None else self._other_bytes(counters)
        return other_bytes + counters.peak_bytes + more_bytes <= ROOM_SHARE * limit_bytes

    @property
    def left_bytes(self) -> int | None:
        """Memory limit minus this process's memory, without its children; None without a limit."""
        if self._job.limit_bytes is None:
            return None
        counters = self.read()
        held_bytes = counters.resident_bytes
        if self.device.wired_bytes is not None:  # a Mac's resident set leaves most of MLX's buffers out
            held_bytes += counters.active_bytes + counters.cache_bytes
        return max(0, self._job.limit_bytes - held_bytes)

    @property
    def clears(self) -> bool:
        """Whether the cache is cleared at fixed points."""
        return self._always

    @property
    def waits(self) -> bool:
        """Whether the current update must finish before the next one begins, rather than overlap with it.

        Every REVIEW_EVERY_STEPS it must, so that the counters are read with nothing in flight: the lowest show leaks.
        """
        review_is_next = (self._updates + 1) % REVIEW_EVERY_STEPS == 0
        return self._always or review_is_next or (self._budget is not None and self._budget.tight)

    @property
    def splits_update(self) -> bool:
        """Whether the gradients are evaluated separately, so that the cache can be cleared after them."""
        return self._always and self._job.clear_after_gradients

    def before_gradients(self) -> None:
        """Call before the first forward pass of an update."""
        if self._always and self._job.clear_before_gradients:
            self._clear()

    def after_gradients(self) -> None:
        """Call once a micro-batch's gradients are evaluated and its activations are freed."""
        if self.splits_update:
            self._clear()

    def after_update(self) -> None:
        """Call once the new weights are evaluated and the gradients are freed."""
        if self._always and self._job.clear_after_update:
            self._clear()

    def note_update(self) -> Counters:
        """Read the counters at the end of an update, and adapt the limits to them.

        The next update may have begun already, so its peak counts from the end of the update before this one.
        """
        counters = self.read()
        self._updates += 1
        self._peak_before_bytes = mx.get_peak_memory()
        mx.reset_peak_memory()
        if self._budget is None:
            return counters
        self._relieve_pressure(self._budget, counters)
        other_bytes = self._other_bytes(counters)
        self._set_cache_limit(self._budget.add(counters.active_bytes, counters.peak_bytes, other_bytes))
        return counters

    def note_evaluated(self) -> None:
        """Call after a batch of an evaluation: the budget has not measured its need."""
        if self._budget is not None:
            self._relieve_pressure(self._budget, self.read())

    def _relieve_pressure(self, budget: CacheBudget, counters: Counters) -> None:
        if budget.is_under_pressure(counters.active_bytes, counters.cache_bytes, self._other_bytes(counters)):
            mx.clear_cache()
            self._set_cache_limit(budget.relieve())

    def _other_bytes(self, counters: Counters) -> int:
        """This process's memory outside MLX's buffers. A Mac's resident set leaves most of the buffers out."""
        if self.device.wired_bytes is not None:
            return counters.resident_bytes
        return max(0, counters.resident_bytes - counters.active_bytes - counters.cache_bytes)

    def _set_cache_limit(self, limit_bytes: int | None) -> None:
        if limit_bytes is None:
            return
        if self._job.cache_limit_bytes is not None:
            limit_bytes = min(limit_bytes, self._job.cache_limit_bytes)
        mx.set_cache_limit(limit_bytes)
        if self._budget is not None and self.device.enforces:
            mx.set_memory_limit(self._budget.room_bytes)

    def relieve(self) -> Counters:
        """Free Python's garbage, then MLX's cache, which stays smaller for a while."""
        gc.collect()
        self._clear()
        if self._budget is not None:
            self._set_cache_limit(self._budget.relieve())
        return self.read()

    def start_peak(self) -> None:
        """Restart the peak counter."""
        mx.reset_peak_memory()
        self._peak_before_bytes = 0

    def read(self) -> Counters:
        """The counters now."""
        resident_bytes, process_bytes = self._own.read()
        active_bytes = mx.get_active_memory()
        peak_bytes = max(mx.get_peak_memory(), self._peak_before_bytes, active_bytes)
        free_bytes = self.device.recent_free_bytes()
        return Counters(active_bytes, mx.get_cache_memory(), peak_bytes, resident_bytes, process_bytes, free_bytes)

    def _clear(self) -> None:
        mx.clear_cache()
        if self._job.release_pause_s:
            time.sleep(self._job.release_pause_s)
