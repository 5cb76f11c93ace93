"""The supervisor's request for an autopsy: three censuses, a few updates apart, and one report of what grew.

Nothing is counted before the first request. A finding grew from the first census to the second and again to the third;
a single burst is not reported.
"""

import sys
import time
from collections.abc import Callable

from mlx_supervisor import wire
from mlx_worker.autopsy import census
from mlx_worker.autopsy.census import Census
from mlx_worker.autopsy.findings import cut, search
from mlx_worker.autopsy.lazy_graphs import Bounds
from mlx_worker.memory.cache_policy import CachePolicy
from mlx_worker.supervision.link import Link
from mlx_worker.supervision.stop import StopFlag

CENSUSES = 3
UPDATES_BETWEEN = 3
SHARE = 0.3
"""Of the remaining time: for a census that is not the last."""
COUNTING_SHARE = 0.6
"""Of the time for the last census; the rest is for finding holders."""
UNINTERRUPTED_S = 60.0
"""Upper bound for a garbage collection or a graph walk that overruns the limit on a slow machine: for the watchdog."""
ROOM_SHARE = 0.4
"""Of the memory left below the limit: for counting, and as much again for walking graphs."""


class AutopsyHandler:
    """Serves one request at a time; a second request meanwhile is answered by the same report."""

    def __init__(self, link: Link, stop: StopFlag, memory: CachePolicy) -> None:
        self._link, self._stop, self._memory = link, stop, memory
        self._request: wire.Autopsy | None = None
        self._censuses: list[Census] = []
        self._preallocated: list[Census] = []
        self._earlier: Census | None = None
        self._spent_s = 0.0
        self._native_bytes: int | None = None
        self.count_shapes: Callable[[], int] = lambda: 0
        """Of the shapes that the loss was compiled for."""

    def request(self, command: wire.Autopsy) -> None:
        """The first census comes after the current update."""
        if self._request is None:
            self._request, self._spent_s = command, 0.0
            self._censuses, self._preallocated = [], [Census() for _ in range(CENSUSES)]

    @property
    def requested(self) -> bool:
        """Whether a report is due."""
        return self._request is not None

    @property
    def bound_s(self) -> float:
        """How long a census may take, uninterruptible calls included; 0 without a request."""
        return 0.0 if self._request is None else self._request.limit_s + UNINTERRUPTED_S

    def is_due(self, step: int) -> bool:
        """Whether a census is due after this update; the next update must not have begun by then."""
        if self._native_bytes is None:  # once, when everything is loaded
            self._native_bytes = census.native_bytes()
        if self._request is None:
            return False
        return not self._censuses or self._stop.requested or step >= self._censuses[-1].step + UPDATES_BETWEEN

    def after_update(self, step: int) -> None:
        """Take a census if one is due. Never raises. The last census sends the report."""
        if self.is_due(step):
            self._examine(step, last=self._stop.requested or len(self._censuses) == CENSUSES - 1)

    def finish(self, step: int) -> None:
        """No more updates come: answer an open request now."""
        if self._request is not None:
            self._examine(step, last=True)

    def _examine(self, step: int, *, last: bool) -> None:
        assert self._request is not None
        started_s = time.monotonic()
        left_s = max(0.0, self._request.limit_s - self._spent_s)
        until_s = started_s + (left_s if last else SHARE * left_s)
        complete, findings = False, list[wire.Finding]()
        try:
            complete, findings = self._search(step, until_s, last=last)
        except Exception as error:  # an autopsy must not end training
            last = True
            findings = [wire.Finding(kind="note", what=cut(f"the search failed: {type(error).__name__}: {error}"))]
        self._spent_s += time.monotonic() - started_s
        if last:
            self._link.send(wire.AutopsyReport, step=step, seconds=self._spent_s, complete=complete, findings=findings)
            self._end()

    def _search(self, step: int, until_s: float, *, last: bool) -> tuple[bool, list[wire.Finding]]:
        now, now_s = self._preallocated.pop(), time.monotonic()
        counted_s = now_s + (until_s - now_s) * (COUNTING_SHARE if last else 1)
        objects = census.take(now, step, counted_s, self._bounds())
        now.shapes = self.count_shapes()
        self._censuses.append(now)
        if not last:
            return True, []
        censuses = [each for each in self._censuses[:-1] if each.step < step]
        if not censuses and self._earlier is not None and self._earlier.step < step:
            censuses = [self._earlier]
        censuses.append(now)
        findings, in_time = search(censuses, objects, until_s)
        return in_time and all(each.complete for each in self._censuses), findings

    def _bounds(self) -> Bounds:
        native_bytes = census.native_bytes()
        grown_bytes = max(0, native_bytes - (self._native_bytes or 0))
        left_bytes = self._memory.left_bytes
        room_bytes = sys.maxsize if left_bytes is None else int(ROOM_SHARE * left_bytes)
        return Bounds(native_bytes, grown_bytes, room_bytes)

    def _end(self) -> None:
        """Keep the small and lasting part of the last census, as a baseline for a request that has no other."""
        self._earlier = self._censuses[-1] if self._censuses else None
        if self._earlier is not None:
            self._earlier.forget_addresses()
        self._request, self._censuses, self._preallocated = None, [], []
