"""Polls the machine's memory for a run that has no worker: on request, and repeatedly while it waits."""

import asyncio
import time
from collections.abc import Callable

import structlog

from mlx_supervisor.core.events import MachineSample
from mlx_supervisor.host import memory as machine_memory

FIRST_INTERVAL_S = 0.05
"""Memory mostly comes back at once, or within a blink: a restart should not pay a second for it."""
INTERVAL_S = 1.0

log = structlog.get_logger()


class HostPoller:
    """`post` takes a `MachineSample`; it is called on the event loop."""

    def __init__(self, post: Callable[[MachineSample], None]) -> None:
        self._post = post
        self._timer: asyncio.TimerHandle | None = None
        self._interval_s = FIRST_INTERVAL_S

    def poll(self) -> None:
        """Read the machine now. A machine that can't be read is said so in the log, and nothing is waited for."""
        try:
            memory = machine_memory.read()
        except Exception as error:  # whatever it is: a start must not fail for want of a figure
            log.error("the machine's memory can't be read", error=repr(error))
            return
        self._post(MachineSample(time.monotonic(), memory.available_bytes, memory.pressure))

    def repeat(self, waiting: bool) -> None:
        """Poll repeatedly while `waiting`; may be called again at any time."""
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
        if self._timer is None and self._interval_s > FIRST_INTERVAL_S:  # nothing was posted: whoever waits still does
            self.repeat(True)
