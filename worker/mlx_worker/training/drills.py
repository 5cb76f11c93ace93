"""Fire drills: deliberate faults at a given step, before its update completes."""

import ctypes
import time
from typing import Any

import mlx.core as mx

from mlx_supervisor import wire
from mlx_worker.supervision.stop import StopFlag

MIB = 1024 * 1024
ARRAY_BYTES = 1024 * MIB
"""Of one leaked array: MLX's shapes are 32-bit integers, so one of 2 GiB or more can't be made."""


class DrillError(RuntimeError):
    """The crash that a drill requested."""


class Drills:
    """The drills of this generation. What they leak stays in this object."""

    def __init__(self, job: wire.DrillJob, generation: int) -> None:
        self._on = not job.generations or generation in job.generations
        self._job = job
        self._kept: list[Any] = []

    @property
    def within_updates(self) -> bool:
        """Whether a drill may act within an update: then the update before must be finished and reported first."""
        job = self._job
        return self._on and any((job.leak_mib_per_step, job.allocate_mib, job.crash_at_step, job.hang_at_step))

    def slow_start(self, stop: StopFlag) -> None:
        """Wait for the requested time, unless a stop comes."""
        end_s = time.monotonic() + (self._job.slow_start_s if self._on else 0.0)
        while time.monotonic() < end_s and not stop.requested:
            time.sleep(0.05)

    def within_update(self, step: int) -> None:
        """Call between the gradients and the update that makes `step`."""
        if not self._on:
            return
        job = self._job
        if job.leak_mib_per_step and step >= job.leak_from_step:
            self._keep(int(job.leak_mib_per_step * MIB), native=job.leak_kind == "native")
        if job.allocate_mib and step == job.allocate_at_step:
            self._keep(job.allocate_mib * MIB, native=job.leak_kind == "native")
        if step == job.crash_at_step:
            raise DrillError(f"drill: crash at step {step}")
        if step == job.hang_at_step:
            _hang(native=job.hang_kind == "native")

    def _keep(self, size_bytes: int, *, native: bool) -> None:
        if native:
            self._kept.append(bytearray(b"\x01") * size_bytes)  # written, so that every page is resident
            return
        # A constant: the drilled run must draw the same random numbers as an undisturbed one.
        whole, rest = divmod(size_bytes, ARRAY_BYTES)
        arrays = [mx.full((size,), 1, dtype=mx.uint8) for size in (*[ARRAY_BYTES] * whole, rest) if size]
        mx.eval(arrays)
        self._kept += arrays


def _hang(*, native: bool) -> None:
    while True:
        if native:
            _deadlock_holding_the_lock()
        time.sleep(3600)


def _deadlock_holding_the_lock() -> None:
    """Lock a mutex twice in C while holding the interpreter's lock: no signal handler in Python runs any more."""
    library = ctypes.PyDLL(None)
    mutex = ctypes.create_string_buffer(256)  # larger than any platform's pthread_mutex_t
    library.pthread_mutex_init(mutex, None)
    library.pthread_mutex_lock(mutex)
    library.pthread_mutex_lock(mutex)
