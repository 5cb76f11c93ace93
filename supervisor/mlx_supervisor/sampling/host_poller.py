"""Polls the machine's memory for a run that has no worker: on request, and repeatedly while it waits."""

import asyncio
import time
from collections.abc import Callable

import structlog

from mlx_supervisor.core.events import MachineSample
from mlx_supervisor.host import memory as machine_memory

FIRST_INTERVAL_S = 0.05
"""Memory is mostly free again at once; a restart should not wait a second for it."""
INTERVAL_S = 1.0

log = structlog.get_logger()


class HostPoller:
    """Calls `post` with a `MachineSample`, on the event loop.

    `device_free`: reads the free memory of the device that the run's last worker used; None: unknown.
    """

    def __init__(
        self, post: Callable[[MachineSample], None], device_free: Callable[[], int | None] = lambda: None
    ) -> None:
        self._post = post
        self._device_free = device_free
        self._timer: asyncio.TimerHandle | None = None
        self._interval_s = FIRST_INTERVAL_S

    def poll(self) -> None:
        """Read the machine's memory now. A failure is logged, and nothing is posted."""
        try:
            memory = machine_memory.read()
        except Exception as error:  # of any kind: a start must not fail because of it
            log.error("machine_memory_unreadable", error=repr(error))
            return
        free_bytes = self._device_free()
        self._post(MachineSample(time.monotonic(), memory.available_bytes, memory.pressure, free_bytes))

    def repeat(self, waiting: bool) -> None:
        """Poll repeatedly while `waiting`. Calling it again is harmless."""
        if not waiting:
            if self._timer is not None:
                self._timer.cancel()
            self._timer, self._interval_s = None, FIRST_INTERVAL_S
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._interval_s, self._poll_again)

    def _poll_again(self) -> None:
        self._timer = None
        self._interval_s = min(2 * self._interval_s, INTERVAL_S)
        self.poll()
        if self._timer is None and self._interval_s > FIRST_INTERVAL_S:  # nothing was posted: the run still waits
            self.repeat(True)
