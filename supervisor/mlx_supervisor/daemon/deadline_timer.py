"""Wakes a run's machine at its next deadline."""

import asyncio
import math
import time
from collections.abc import Callable

import structlog

LATE_S = 1.0
"""A timer that fires this late means that the supervisor was stopped or stuck."""
CATCH_UP_S = 1.0
"""The deadline is then postponed by this much, so that the worker's queued messages are read first."""

log = structlog.get_logger()


class DeadlineTimer:
    """Calls `on_deadline` once `next_deadline()` has passed, in seconds of the monotonic clock. `run`: for the log."""

    def __init__(self, run: str, next_deadline: Callable[[], float | None], on_deadline: Callable[[], None]) -> None:
        self._run = run
        self._next_deadline = next_deadline
        self._on_deadline = on_deadline
        self._timer: asyncio.TimerHandle | None = None
        self._timer_s = math.inf
        self._postponed_s: float | None = None
        self._catch_up_s = -math.inf

    def schedule(self) -> None:
        """Set the timer to the next deadline. An early timer is harmless: it sets the next one."""
        deadline_s = self._next_deadline()
        if deadline_s is None:
            return
        at_s = max(deadline_s, self._catch_up_s)
        if self._timer_s <= at_s:
            return
        self.cancel()
        self._timer_s = at_s
        self._timer = asyncio.get_running_loop().call_later(max(at_s - time.monotonic(), 0.0), self._fire)

    def cancel(self) -> None:
        """Stop the timer until `schedule`."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self._timer_s = None, math.inf

    def _fire(self) -> None:
        due_s, self._timer, self._timer_s = self._timer_s, None, math.inf
        now_s, deadline_s = time.monotonic(), self._next_deadline()
        if now_s - due_s > LATE_S and deadline_s != self._postponed_s:
            self._postponed_s, self._catch_up_s = deadline_s, now_s + CATCH_UP_S
            log.warning("supervisor_was_stuck", run=self._run, late_s=round(now_s - due_s, 1))
            self.schedule()
            return
        self._on_deadline()
