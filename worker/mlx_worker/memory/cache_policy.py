"""What becomes of MLX's cache, and what its counters say."""

import contextlib
import gc
import time
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import psutil

from mlx_supervisor import wire
from mlx_worker.memory.cache_budget import LOOK_EVERY_STEPS, CacheBudget

ROOM_SHARE = 0.9
"""Of the memory limit: what `has_room` leaves free is for what varies from update to update."""


@dataclass(frozen=True)
class Counters:
    """Bytes: MLX's own counters, and the resident set of this process."""

    active_bytes: int
    cache_bytes: int
    peak_bytes: int
    resident_bytes: int


class Memory:
    """The job's policy. Clearing points belong to "always"; "adaptive" bounds the cache, and the allocator trims it."""

    def __init__(self, job: wire.MemoryJob) -> None:
        self._job = job
        self._always = job.policy == "always"
        self._process = psutil.Process()
        self._peak_before_bytes = 0
        self._updates = 0
        self._device = _Device()
        self._budget = self._new_budget() if job.policy == "adaptive" else None
        if job.cache_limit_bytes is not None:
            mx.set_cache_limit(job.cache_limit_bytes)
        if self._budget is not None and self._device.enforces:
            mx.set_memory_limit(self._budget.room_bytes)
        if self._device.wired_bytes is not None:  # Metal only; as mlx_lm's trainer does
            mx.set_wired_limit(self._device.wired_bytes)

    def _new_budget(self) -> CacheBudget | None:
        limit_bytes, device = self._limit_bytes(), self._device
        if limit_bytes is None:
            return None
        return CacheBudget(limit_bytes, own=device.own_bytes is not None, enforced=device.enforces)

    def _limit_bytes(self) -> int | None:
        """Of the memory that MLX's buffers are in; None when nobody set one."""
        job, device = self._job, self._device
        if device.own_bytes is not None:
            limit_bytes = job.device_limit_bytes or int(job.device_limit_share * device.own_bytes)
            return min(limit_bytes, device.own_bytes)
        if job.limit_bytes is not None and device.wired_bytes is not None:
            return min(job.limit_bytes, device.wired_bytes)
        return job.limit_bytes

    def has_room(self, more_bytes: int) -> bool:
        """Whether arrays of that size may be kept alive through the next update, if it needs what the last one did.

        The cache is not counted: it gives way.
        """
        limit_bytes = self._limit_bytes()
        if limit_bytes is None:
            return True
        counters = self.read()
        other_bytes = 0 if self._device.own_bytes is not None else self._other_bytes(counters)
        return other_bytes + counters.peak_bytes + more_bytes <= ROOM_SHARE * limit_bytes

    @property
    def left_bytes(self) -> int | None:
        """What this process may still take of the memory limit, its children not counted; None without a limit."""
        if self._job.limit_bytes is None:
            return None
        counters = self.read()
        held_bytes = counters.resident_bytes
        if self._device.wired_bytes is not None:  # a Mac's resident set leaves most of MLX's buffers out
            held_bytes += counters.active_bytes + counters.cache_bytes
        return max(0, self._job.limit_bytes - held_bytes)

    @property
    def clears(self) -> bool:
        """Whether the cache is cleared at fixed points."""
        return self._always

    @property
    def waits(self) -> bool:
        """Whether the update in hand is to be done before the next one begins, rather than overlap with its beginning.

        Now and then it is, so that the counters are read with nothing in flight: leaks are found in the lowest ones.
        """
        looks_next = (self._updates + 1) % LOOK_EVERY_STEPS == 0
        return self._always or looks_next or (self._budget is not None and self._budget.tight)

    @property
    def splits_update(self) -> bool:
        """Whether the gradients are to be evaluated on their own, so that there is something to clear after them."""
        return self._always and self._job.clear_after_gradients

    def before_gradients(self) -> None:
        """Before the first forward pass of an update."""
        if self._always and self._job.clear_before_gradients:
            self._clear()

    def after_gradients(self) -> None:
        """Once a micro-batch's gradients are evaluated and its activations are gone."""
        if self.splits_update:
            self._clear()

    def after_update(self) -> None:
        """Once the new weights are evaluated and the gradients dropped."""
        if self._always and self._job.clear_after_update:
            self._clear()

    def note_update(self) -> Counters:
        """The counters at the end of an update, by which an adaptive policy goes.

        The next update may have begun already: its peak counts from the end of the update before this one.
        """
        counters = self.read()
        self._updates += 1
        self._peak_before_bytes = mx.get_peak_memory()
        mx.reset_peak_memory()
        if self._budget is None:
            return counters
        self._mind_pressure(self._budget, counters)
        other_bytes = self._other_bytes(counters)
        self._set_cache_limit(self._budget.add(counters.active_bytes, counters.peak_bytes, other_bytes))
        return counters

    def note_evaluated(self) -> None:
        """After a batch of an evaluation, whose needs the budget has not measured."""
        if self._budget is not None:
            self._mind_pressure(self._budget, self.read())

    def _mind_pressure(self, budget: CacheBudget, counters: Counters) -> None:
        if budget.is_under_pressure(counters.active_bytes, counters.cache_bytes, self._other_bytes(counters)):
            mx.clear_cache()
            self._set_cache_limit(budget.relieve())

    def _other_bytes(self, counters: Counters) -> int:
        """What this process holds besides MLX's buffers. A Mac's resident set leaves most of those out."""
        if self._device.wired_bytes is not None:
            return counters.resident_bytes
        return max(0, counters.resident_bytes - counters.active_bytes - counters.cache_bytes)

    def _set_cache_limit(self, limit_bytes: int | None) -> None:
        if limit_bytes is None:
            return
        if self._job.cache_limit_bytes is not None:
            limit_bytes = min(limit_bytes, self._job.cache_limit_bytes)
        mx.set_cache_limit(limit_bytes)
        if self._budget is not None and self._device.enforces:
            mx.set_memory_limit(self._budget.room_bytes)

    def relieve(self) -> Counters:
        """All that can be given back at once: Python's garbage, then MLX's cache, which stays smaller for a while."""
        gc.collect()
        self._clear()
        if self._budget is not None:
            self._set_cache_limit(self._budget.relieve())
        return self.read()

    def start_peak(self) -> None:
        """Peak counts from here."""
        mx.reset_peak_memory()
        self._peak_before_bytes = 0

    def read(self) -> Counters:
        """The counters now."""
        resident_bytes = 0
        with contextlib.suppress(psutil.Error):
            resident_bytes = self._process.memory_info().rss
        active_bytes = mx.get_active_memory()
        peak_bytes = max(mx.get_peak_memory(), self._peak_before_bytes, active_bytes)
        return Counters(active_bytes, mx.get_cache_memory(), peak_bytes, resident_bytes)

    def _clear(self) -> None:
        mx.clear_cache()
        if self._job.release_pause_s:
            time.sleep(self._job.release_pause_s)


class _Device:
    """The device that computes. `own_bytes`: its own memory (CUDA); `wired_bytes`: what it may use of ours (Metal).

    `enforces`: the allocator keeps active and cached memory together under `mx.set_memory_limit`, by giving back cached
    buffers before it asks for more; the CPU's does not.
    """

    def __init__(self) -> None:
        information: dict[str, Any] = dict(mx.device_info())
        self.enforces = bool(mx.default_device().type == mx.DeviceType.gpu)
        wired_bytes = information.get("max_recommended_working_set_size")
        self.wired_bytes = None if wired_bytes is None else int(wired_bytes)
        own_bytes = information.get("total_memory") if self.enforces else None
        self.own_bytes = None if own_bytes is None else int(own_bytes)
