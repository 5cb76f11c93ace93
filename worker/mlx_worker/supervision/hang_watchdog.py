"""A watchdog for hangs, including those in native code."""

import faulthandler
import time

_HANG_FLOOR_S = 300.0
"""Shortest bound without a `hang_timeout_s`, and always for the first update, which also compiles."""
_HANG_FACTOR = 50.0
"""Of the slowest update: the bound without a `hang_timeout_s`."""
_HANG_MARGIN = 1.5
"""The supervisor acts first; this watchdog is for the case that the supervisor has died."""


class HangWatchdog:
    """Writes all stacks and ends the process unless re-armed in time. A thread in C: it needs no interpreter lock."""

    def __init__(self, hang_timeout_s: float | None) -> None:
        self._given_s = hang_timeout_s
        self._slowest_s = 0.0
        self._armed_at_s = float("-inf")
        self._armed_bound_s = 0.0

    def note_update(self, seconds: float) -> None:
        """Record an update's time; the bound follows the slowest."""
        self._slowest_s = max(self._slowest_s, seconds)
        self.arm()

    def arm(self, floor_s: float = 0.0) -> None:
        """Restart the timer. `floor_s`: allow at least that much, for work other than updates."""
        bound_s = max(self._bound_s(), floor_s)
        now_s = time.monotonic()
        similar = self._armed_bound_s <= bound_s <= 1.05 * self._armed_bound_s
        if similar and now_s - self._armed_at_s < self._armed_bound_s / 20:
            return  # arming starts a thread: too slow for every update of a millisecond
        self._armed_at_s, self._armed_bound_s = now_s, bound_s
        faulthandler.dump_traceback_later(bound_s, exit=True, file=2)

    def disarm(self) -> None:
        """Stop the timer."""
        faulthandler.cancel_dump_traceback_later()

    def _bound_s(self) -> float:
        if self._given_s is not None and self._slowest_s > 0:  # the first update also compiles
            return _HANG_MARGIN * self._given_s
        return max(_HANG_FLOOR_S, _HANG_FACTOR * self._slowest_s)
