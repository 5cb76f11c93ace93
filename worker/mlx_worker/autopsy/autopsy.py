"""What grew: asked for by the supervisor when memory leaks, told after three looks, a few updates apart.

Nothing is counted before the first request. What grew from the first look to the second, and again to the third, is
told with what holds it; a burst that happened once is not.
"""

import sys
import time
from collections.abc import Callable

from mlx_supervisor import wire
from mlx_worker.autopsy import census
from mlx_worker.autopsy import findings as growth
from mlx_worker.autopsy.census import Census
from mlx_worker.autopsy.lazy_graphs import Bounds
from mlx_worker.memory.cache_policy import Memory
from mlx_worker.supervision.link import Link
from mlx_worker.supervision.stop import StopFlag

LOOKS = 3
UPDATES_BETWEEN = 3
SHARE = 0.3
"""Of the time that is left: for a look that is not the last."""
COUNTING_SHARE = 0.6
"""Of the time for the last look; the rest is for finding holders."""
UNINTERRUPTED_S = 60.0
"""More than a garbage collection or a walk of a graph takes beyond the limit, on a slow machine: for the watchdog."""
ROOM_SHARE = 0.4
"""Of what the limit leaves: for counting, and as much again for walking graphs. A look must not be what passes it."""


class Autopsy:
    """One request at a time; another one meanwhile is answered by the same report."""

    def __init__(self, link: Link, stop: StopFlag, memory: Memory) -> None:
        self._link, self._stop, self._memory = link, stop, memory
        self._asked: wire.Autopsy | None = None
        self._looks: list[Census] = []
        self._spare: list[Census] = []
        self._earlier: Census | None = None
        self._spent_s = 0.0
        self._native_bytes: int | None = None
        self.count_shapes: Callable[[], int] = lambda: 0
        """Of the shapes that the loss was compiled for."""

    def request(self, command: wire.Autopsy) -> None:
        """The first look comes after the update in hand."""
        if self._asked is None:
            self._asked, self._spent_s = command, 0.0
            self._looks, self._spare = [], [Census() for _ in range(LOOKS)]

    @property
    def requested(self) -> bool:
        """Whether a report is owed."""
        return self._asked is not None

    @property
    def bound_s(self) -> float:
        """How long a look may take, with what cannot be interrupted; 0 when none was asked for."""
        return 0.0 if self._asked is None else self._asked.limit_s + UNINTERRUPTED_S

    def waits(self, step: int) -> bool:
        """Whether there is a look to be taken after this update, for which the next must not have begun."""
        if self._native_bytes is None:  # once, when everything is loaded
            self._native_bytes = census.native_bytes()
        if self._asked is None:
            return False
        return not self._looks or self._stop.requested or step >= self._looks[-1].step + UPDATES_BETWEEN

    def look(self, step: int) -> None:
        """After this update, with none begun. Never raises. The last look sends the report."""
        if self.waits(step):
            self._look(step, last=self._stop.requested or len(self._looks) == LOOKS - 1)

    def finish(self, step: int) -> None:
        """No more updates come: what was asked for is answered now."""
        if self._asked is not None:
            self._look(step, last=True)

    def _look(self, step: int, *, last: bool) -> None:
        assert self._asked is not None
        started_s = time.monotonic()
        left_s = max(0.0, self._asked.limit_s - self._spent_s)
        until_s = started_s + (left_s if last else SHARE * left_s)
        baseline_step, complete, findings = step, False, list[wire.Finding]()
        try:
            baseline_step, complete, findings = self._search(step, until_s, last=last)
        except Exception as error:  # training must not die of it
            last = True
            text = f"the search failed: {type(error).__name__}: {error}"
            findings = [wire.Finding(kind="note", what=growth.cut(text))]
        self._spent_s += time.monotonic() - started_s
        if last:
            self._link.send(
                wire.AutopsyReport,
                step=step, baseline_step=baseline_step, seconds=self._spent_s, complete=complete, findings=findings,
            )  # fmt: skip
            self._end()

    def _search(self, step: int, until_s: float, *, last: bool) -> tuple[int, bool, list[wire.Finding]]:
        now, now_s = self._spare.pop(), time.monotonic()
        counted_s = now_s + (until_s - now_s) * (COUNTING_SHARE if last else 1)
        objects = census.take(now, step, counted_s, self._bounds())
        now.shapes = self.count_shapes()
        self._looks.append(now)
        if not last:
            return step, True, []
        looks = [look for look in self._looks[:-1] if look.step < step]
        if not looks and self._earlier is not None and self._earlier.step < step:
            looks = [self._earlier]
        looks.append(now)
        findings, in_time = growth.search(looks, objects, until_s)
        return looks[0].step, in_time and all(look.complete for look in self._looks), findings

    def _bounds(self) -> Bounds:
        native_bytes = census.native_bytes()
        grown_bytes = max(0, native_bytes - (self._native_bytes or 0))
        left_bytes = self._memory.left_bytes
        room_bytes = sys.maxsize if left_bytes is None else int(ROOM_SHARE * left_bytes)
        return Bounds(native_bytes, grown_bytes, room_bytes)

    def _end(self) -> None:
        """Keep of the last look what is small and still means something later, for want of another baseline."""
        self._earlier = self._looks[-1] if self._looks else None
        if self._earlier is not None:
            self._earlier.forget_addresses()
        self._asked, self._looks, self._spare = None, [], []
