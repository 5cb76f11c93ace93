"""The device that computes: whether its memory is its own, and how much of it this run may hold."""

import sys
import threading
import time
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_supervisor import wire

FREE_SHARE = 0.95
"""Of what other processes leave when the worker starts: a limit that is a share never exceeds it."""
OVERHEAD_BYTES = 768 * 1024 * 1024
OVERHEAD_SHARE = 0.125
"""Of the limit, kept for CUDA's context and the libraries' workspaces, which MLX's counters leave out: the first, or
this share of the limit if that is less."""
FREE_INTERVAL_S = 1.0
"""How often the free memory is read."""
READING_S = 2.0
"""After a failed allocation the driver may not answer."""


class Device:
    """The default device. `own_bytes`: its own memory (CUDA); `wired_bytes`: how much RAM it may use (Metal).

    `enforces`: the allocator keeps active plus cached memory under `mx.set_memory_limit`, by freeing cached buffers
    before it allocates more; the CPU's does not. `free_at_start_bytes`: of its own memory, before this process used it.
    """

    def __init__(self) -> None:
        information: dict[str, Any] = dict(mx.device_info())
        self.enforces = bool(mx.default_device().type == mx.DeviceType.gpu)
        wired_bytes = information.get("max_recommended_working_set_size")
        self.wired_bytes = None if wired_bytes is None else int(wired_bytes)
        own_bytes = information.get("total_memory") if self.enforces else None
        self.own_bytes = None if own_bytes is None else int(own_bytes)
        free_bytes = information.get("free_memory")
        self.free_at_start_bytes = None if free_bytes is None or own_bytes is None else int(free_bytes)
        self.uuid = str(information.get("uuid", ""))
        self._read_s = float("-inf")

    def limit_bytes(self, job: wire.MemoryJob) -> int | None:
        """What this run may hold of the device's own memory; None: it has none.

        A limit in bytes counts as it is. A share is of the whole memory, but never more than other processes leave.
        """
        if self.own_bytes is None:
            return None
        if job.device_limit_bytes is not None:
            return min(job.device_limit_bytes, self.own_bytes)
        share_bytes = int(job.device_limit_share * self.own_bytes)
        if self.free_at_start_bytes is None:
            return share_bytes
        return min(share_bytes, int(FREE_SHARE * self.free_at_start_bytes))

    def facts(self, limit_bytes: int) -> dict[str, Any]:
        """The fields of the message that names a device with its own memory; empty without one."""
        if self.own_bytes is None:
            return {}
        return {"total_bytes": self.own_bytes, "limit_bytes": limit_bytes, "uuid": self.uuid}

    def recent_free_bytes(self) -> int | None:
        """What all processes leave of the device's own memory, as its driver says; None: unknown, or read just now."""
        now_s = time.monotonic()
        if self.own_bytes is None or now_s - self._read_s < FREE_INTERVAL_S:
            return None
        self._read_s = now_s
        free_bytes: Any = mx.device_info().get("free_memory")
        return None if free_bytes is None else int(free_bytes)


def countable_bytes(limit_bytes: int) -> int:
    """What MLX's counters may show under a device's limit: the rest is for memory that they leave out."""
    return limit_bytes - min(OVERHEAD_BYTES, int(OVERHEAD_SHARE * limit_bytes))


class AtDeath(NamedTuple):
    """What MLX held of the device's own memory, and what all processes left; None: unknown, or not its own."""

    held_bytes: int | None = None
    free_bytes: int | None = None


def at_death() -> AtDeath:
    """Read after an error, so that the supervisor can name who holds the memory. Never raises; takes 2 s at most."""
    found: list[AtDeath] = []

    def read() -> None:
        device = Device()
        if device.own_bytes is not None:
            found.append(AtDeath(mx.get_active_memory() + mx.get_cache_memory(), device.free_at_start_bytes))

    thread = threading.Thread(target=_quietly, args=(read,), daemon=True)
    thread.start()
    thread.join(READING_S)
    return found[0] if found else AtDeath()


def _quietly(read: Any) -> None:
    try:
        read()
    except Exception as error:
        print(f"note: the device's memory can't be read: {error}", file=sys.stderr)
