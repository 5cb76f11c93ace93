"""Virtual time, and the schedule of the world."""

import heapq
from collections.abc import Callable
from itertools import count
from random import Random
from typing import Any

Happening = tuple[float, int, Callable[..., object], tuple[Any, ...]]


class SimulatedClock:
    """Seconds of a monotonic clock. Nothing waits: time jumps to the next scheduled call."""

    def __init__(self, now_s: float = 1000.0) -> None:
        self.now_s = now_s
        self._queue: list[Happening] = []
        self._numbers = count()

    def later(self, delay_s: float, happen: Callable[..., object], *arguments: object) -> None:
        """Call `happen(*arguments)` later; calls due at the same time run in the order of scheduling."""
        heapq.heappush(self._queue, (self.now_s + delay_s, next(self._numbers), happen, arguments))

    @property
    def next_s(self) -> float:
        """When the next call is due; infinity without any."""
        return self._queue[0][0] if self._queue else float("inf")

    def step(self) -> None:
        """Run the next call."""
        at_s, _, happen, arguments = heapq.heappop(self._queue)
        if at_s > self.now_s:
            self.now_s = at_s
        happen(*arguments)

    def jump(self, to_s: float, chance: Random | None = None) -> None:
        """All processes were suspended: calls that were due continue as if no time had passed.

        `chance`: calls due within the next second come in random order (a machine that wakes up).
        """
        moved = to_s - self.now_s
        queue = [(at_s + moved, number, happen, arguments) for at_s, number, happen, arguments in self._queue]
        if chance is not None:
            soon_s = to_s + 1.0
            queue = [(to_s + chance.random() if one[0] < soon_s else one[0], *one[1:]) for one in queue]
        heapq.heapify(queue)
        self._queue, self.now_s = queue, to_s
