"""A watchdog for hangs. It counts only time in which this process ran: a pause of the machine is no hang."""

import faulthandler
import math
import os
import threading
import time
from collections.abc import Callable

from mlx_supervisor import wire
from mlx_worker.supervision.stop import leave_signals_to_the_main_thread

_HANG_FLOOR_S = 300.0
"""Shortest bound without a `hang_timeout_s`, and always for the first update, which also compiles."""
_HANG_FACTOR = 50.0
"""Of the slowest update: the bound without a `hang_timeout_s`."""
_HANG_MARGIN = 1.5
"""The supervisor acts first; this watchdog is for the case that the supervisor has died."""
_FAULT_HANDLER_MARGIN = 1.25
_TICK_S = 1.0
_TICK_SHARE = 0.1
"""Of the bound: the watchdog wakes up this often, but at least every second."""


class HangWatchdog:
    """Writes all stacks and ends the process with EXIT_HANG unless re-armed in time.

    It is a thread of Python's, so a native call that keeps the interpreter lock stops it, too. A living supervisor
    detects that hang. Without one (`supervised` returns False), Python's fault handler is armed as well, whose thread
    needs no lock; it cannot tell a pause of the machine from a hang.
    """

    def __init__(self, hang_timeout_s: float | None, supervised: Callable[[], bool] = lambda: False) -> None:
        self._given_s = hang_timeout_s
        self._supervised = supervised
        self._slowest_s = 0.0
        self._times_armed = 0
        self.bound_s = math.inf
        """The longest silence allowed now, in seconds."""
        self._handler_armed_s, self._handler_bound_s = -math.inf, 0.0
        self._thread: threading.Thread | None = None

    def note_update(self, seconds: float) -> None:
        """Record an update's time; the bound follows the slowest."""
        self._slowest_s = max(self._slowest_s, seconds)
        self.arm()

    def arm(self, floor_s: float = 0.0) -> None:
        """Start over. `floor_s`: allow at least that much, for work other than updates."""
        self.bound_s = max(self._usual_s(), floor_s)
        self._times_armed += 1
        if not self._supervised():
            self._arm_fault_handler()
        if self._thread is None:
            self._thread = threading.Thread(target=self._watch, name="hang-watchdog", daemon=True)
            self._thread.start()

    def disarm(self) -> None:
        """Allow any silence, until `arm`."""
        self.bound_s = math.inf
        self._times_armed += 1
        self._handler_bound_s = 0.0
        faulthandler.cancel_dump_traceback_later()

    def _arm_fault_handler(self) -> None:
        """Its bound is longer, so that the thread acts first where it can."""
        bound_s, now_s = _FAULT_HANDLER_MARGIN * self.bound_s, time.monotonic()
        similar = self._handler_bound_s <= bound_s <= 1.05 * self._handler_bound_s
        if similar and now_s - self._handler_armed_s < self._handler_bound_s / 20:
            return  # arming starts a thread: too slow for every update of a millisecond
        self._handler_armed_s, self._handler_bound_s = now_s, bound_s
        faulthandler.dump_traceback_later(bound_s, exit=True, file=2)

    def _usual_s(self) -> float:
        if self._given_s is not None and self._slowest_s > 0:  # the first update also compiles
            return _HANG_MARGIN * self._given_s
        return max(_HANG_FLOOR_S, _HANG_FACTOR * self._slowest_s)

    def _watch(self) -> None:
        leave_signals_to_the_main_thread()
        silent_s, times_armed, last_s = 0.0, -1, time.monotonic()
        while True:
            bound_s = self.bound_s
            tick_s = min(_TICK_S, _TICK_SHARE * bound_s)
            time.sleep(tick_s)
            now_s = time.monotonic()
            ran_s, last_s = min(now_s - last_s, 2 * tick_s), now_s  # the rest of a longer gap was a pause
            if self._times_armed != times_armed:
                silent_s, times_armed = 0.0, self._times_armed
                continue
            silent_s += ran_s
            if silent_s > bound_s:
                _end(bound_s)


def _end(bound_s: float) -> None:
    """The line comes last: the supervisor reads the cause from it."""
    faulthandler.dump_traceback(file=2, all_threads=True)
    line = f"\n{wire.HANG_LINE} {bound_s:.3g} s; ending the worker\n"
    os.write(2, line.encode())
    os._exit(wire.EXIT_HANG)
