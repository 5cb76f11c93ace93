"""Virtual time, and what is to happen when."""

import heapq
from collections.abc import Callable
from itertools import count
from random import Random
from typing import Any

Happening = tuple[float, int, Callable[..., object], tuple[Any, ...]]


class Clock:
    """Seconds of a monotonic clock. Nothing waits: time jumps to whatever comes next."""

    def __init__(self, now_s: float = 1000.0) -> None:
        self.now_s = now_s
        self._queue: list[Happening] = []
        self._numbers = count()

    def later(self, delay_s: float, happen: Callable[..., object], *arguments: object) -> None:
        """Have `happen(*arguments)` called; what is due at the same time happens in the order of being asked for."""
        heapq.heappush(self._queue, (self.now_s + delay_s, next(self._numbers), happen, arguments))

    @property
    def next_s(self) -> float:
        """When the next thing is due; infinity when nothing is."""
        return self._queue[0][0] if self._queue else float("inf")

    def step(self) -> None:
        """Let the next thing happen."""
        at_s, _, happen, arguments = heapq.heappop(self._queue)
        if at_s > self.now_s:
            self.now_s = at_s
        happen(*arguments)

    def jump(self, to_s: float, chance: Random | None = None) -> None:
        """All processes stood still meanwhile: what was due goes on as if no time had passed.

        `chance`: what was due within the next second comes in any order (a machine that wakes up).
        """
        moved = to_s - self.now_s
        queue = [(at_s + moved, number, happen, arguments) for at_s, number, happen, arguments in self._queue]
        if chance is not None:
            soon_s = to_s + 1.0
            queue = [(to_s + chance.random() if one[0] < soon_s else one[0], *one[1:]) for one in queue]
        heapq.heapify(queue)
        self._queue, self.now_s = queue, to_s
