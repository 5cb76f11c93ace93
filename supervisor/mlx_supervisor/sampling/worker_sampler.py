"""Samples of the workers' memory, taken in a thread of its own so that a busy event loop can't delay them.

The interval follows the headroom over the fastest growth to be feared (as earlyoom does it): at rest the configured
rate, near the limit down to `LEAST_INTERVAL_S`.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from mlx_supervisor.core.events import MemoryPressure, Sample, SampleMissing
from mlx_supervisor.host import memory
from mlx_supervisor.host.footprint import Footprint, Gauge, readers
from mlx_supervisor.host.memory import MachineMemory
from mlx_supervisor.host.process_tree import Processes

LEAST_INTERVAL_S = 0.002
MACHINE_INTERVAL_S = 1.0
"""How often the machine's memory is read anew."""
FEARED_BYTES_PER_S = 512 * 1024 * 1024
"""Growth that is always reckoned with, in bytes a second; faster growth once seen counts instead."""
LOOKS = 4
"""Samples wanted before feared growth reaches the limit."""
PENDING_AT_MOST = 64
"""Samples under way to a stalled event loop; further ones are dropped."""

BRAKE_S = 0.5
"""Over the limit for so long, while the event loop took no sample: it is stuck, and the worker is killed from here."""

NOT_READ = MachineMemory(0, None, MemoryPressure.NORMAL)
Deliver = Callable[[str, Sample | SampleMissing], None]


@dataclass
class _Watch:
    run: str
    generation: int
    gauge: Gauge
    limit_bytes: int
    interval_s: float
    brake: Callable[[], None]
    over_since_s: float | None = None
    due_s: float = 0.0
    last_bytes: int = 0
    last_s: float = 0.0
    fastest_bytes_per_s: float = FEARED_BYTES_PER_S


class WorkerSampler:
    """`deliver` is called in the sampler's thread; `delivered` tells it that a sample has been dealt with.

    What to do about a sample is the event loop's business, but for one case: a worker over its limit while the loop is
    stuck (a hanging disk, for one) would take the machine down.
    """

    def __init__(self, deliver: Deliver) -> None:
        self._deliver = deliver
        self._readers = readers()
        self._machine, self._machine_due_s = NOT_READ, 0.0
        self._watches: dict[str, _Watch] = {}
        self._changed = threading.Condition()
        self._closing = False
        self._pending = 0
        self._delivered_s = time.monotonic()
        self.dropped = 0
        self._thread = threading.Thread(target=self._loop, name="sampler", daemon=True)
        self._thread.start()

    def watch(
        self,
        run: str,
        generation: int,
        session: int,
        limit_bytes: int,
        interval_s: float,
        brake: Callable[[], None] = lambda: None,
        token: str = "",
    ) -> None:
        """Sample a worker, first at once: its session, and what left it with `token` in its environment.

        Replaces an earlier watch of the same run. `brake` kills the worker; it is called in the sampler's thread.
        """
        gauge = Gauge(Processes(session, token), limit_bytes, self._readers)
        with self._changed:
            self._watches[run] = _Watch(run, generation, gauge, limit_bytes, interval_s, brake)
            self._changed.notify()

    def unwatch(self, run: str) -> None:
        """No more samples of this run."""
        with self._changed:
            self._watches.pop(run, None)

    def delivered(self) -> None:
        """A sample arrived in the event loop."""
        with self._changed:
            self._pending -= 1
            self._delivered_s = time.monotonic()

    def close(self) -> None:
        """End the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout=5)

    def _loop(self) -> None:
        while True:
            with self._changed:
                if self._closing:
                    return
                now_s = time.monotonic()
                due = [watch for watch in self._watches.values() if watch.due_s <= now_s]
                if not due:
                    next_s = min((watch.due_s for watch in self._watches.values()), default=None)
                    self._changed.wait(None if next_s is None else next_s - now_s)
                    continue
            for watch in due:
                self._take(watch)

    def _take(self, watch: _Watch) -> None:
        now_s, used_bytes = time.monotonic(), 0
        begun_cpu_s = time.thread_time()
        event: Sample | SampleMissing
        try:
            found = watch.gauge.measure()
            if found is None:  # the worker has ended: nothing is missing, and its exit will be told
                watch.due_s = now_s + watch.interval_s
                return
            used_bytes = found.total_bytes
            event = self._sample(watch, found, now_s)
        except Exception as error:  # whatever it is, the watching must go on, and a zero must not come of it
            event = SampleMissing(now_s, watch.generation, f"{type(error).__name__}: {error}"[:200])
            watch.due_s = now_s + watch.interval_s
        else:
            took_s = time.thread_time() - begun_cpu_s  # counting shared pages can take long: half the time at most
            watch.due_s = now_s + max(self._interval_s(watch, used_bytes, now_s), 2 * took_s)
        over = used_bytes > watch.limit_bytes
        if self._has_room(over):
            self._deliver(watch.run, event)
        self._brake(watch, over, now_s)

    def _sample(self, watch: _Watch, found: Footprint, now_s: float) -> Sample:
        if now_s >= self._machine_due_s:
            self._machine, self._machine_due_s = memory.read(), now_s + MACHINE_INTERVAL_S
        return Sample(
            now_s,
            watch.generation,
            found.total_bytes,
            self._machine.available_bytes,
            found.processes,
            children_bytes=found.children_bytes,
            swap_used_bytes=self._machine.swap_used_bytes,
            pressure=self._machine.pressure,
        )

    def _has_room(self, over: bool) -> bool:
        with self._changed:
            # why a worker was killed from here has to be known once the loop goes on
            if self._pending >= (8 if over else 1) * PENDING_AT_MOST:
                self.dropped += 1
                return False
            self._pending += 1
            return True

    def _brake(self, watch: _Watch, over: bool, now_s: float) -> None:
        if not over:
            watch.over_since_s = None
            return
        watch.over_since_s = watch.over_since_s or now_s
        with self._changed:
            stuck = now_s - max(watch.over_since_s, self._delivered_s) >= BRAKE_S
            if stuck and self._watches.get(watch.run) is watch:  # else its number may be another's
                watch.brake()

    def _interval_s(self, watch: _Watch, used_bytes: int, now_s: float) -> float:
        if watch.last_s:
            growth = (used_bytes - watch.last_bytes) / max(now_s - watch.last_s, LEAST_INTERVAL_S)
            watch.fastest_bytes_per_s = max(growth, 0.9 * watch.fastest_bytes_per_s, FEARED_BYTES_PER_S)
        watch.last_bytes, watch.last_s = used_bytes, now_s
        headroom_s = (watch.limit_bytes - used_bytes) / watch.fastest_bytes_per_s
        return min(max(headroom_s / LOOKS, LEAST_INTERVAL_S), watch.interval_s)
