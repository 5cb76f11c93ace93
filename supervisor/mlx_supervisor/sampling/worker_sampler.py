"""Memory samples of the workers, taken in a separate thread so that a busy event loop can't delay them.

The interval follows the headroom over the fastest expected growth (as in earlyoom): the configured interval far from
the limit, down to `LEAST_INTERVAL_S` near it.
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
"""How often the machine's memory is read."""
EXPECTED_BYTES_PER_S = 512 * 1024 * 1024
"""Growth that is always expected, in bytes per second; faster growth replaces it once seen."""
SAMPLES_BEFORE_LIMIT = 4
"""Samples to take before expected growth reaches the limit."""
PENDING_AT_MOST = 64
"""Samples that a stalled event loop has not processed; further ones are dropped."""
BRAKE_S = 0.5
"""Over the limit for this long without the event loop taking a sample: the loop is stuck, and the worker is killed."""

NOT_READ = MachineMemory(0, MemoryPressure.NORMAL)
Deliver = Callable[[str, Sample | SampleMissing], None]


class Pace:
    """Seconds from one sample to the next; `interval_s` at most."""

    def __init__(self, limit_bytes: int, interval_s: float) -> None:
        self.limit_bytes = limit_bytes
        self.interval_s = interval_s
        self._last: tuple[int, float] | None = None
        self._fastest_bytes_per_s: float = EXPECTED_BYTES_PER_S

    def after(self, used_bytes: int, now_s: float) -> float:
        """The interval after this sample."""
        if self._last is not None:
            last_bytes, last_s = self._last
            growth = (used_bytes - last_bytes) / max(now_s - last_s, LEAST_INTERVAL_S)
            self._fastest_bytes_per_s = max(growth, 0.9 * self._fastest_bytes_per_s, EXPECTED_BYTES_PER_S)
        self._last = used_bytes, now_s
        headroom_s = (self.limit_bytes - used_bytes) / self._fastest_bytes_per_s
        return min(max(headroom_s / SAMPLES_BEFORE_LIMIT, LEAST_INTERVAL_S), self.interval_s)


@dataclass
class _Watch:
    run: str
    generation: int
    gauge: Gauge
    pace: Pace
    brake: Callable[[], None]
    over_since_s: float | None = None
    due_s: float = 0.0


class WorkerSampler:
    """Calls `deliver` in the sampler's thread; `delivered` must be called once a sample has been processed.

    The event loop decides what to do about a sample, with one exception: a worker that is over its limit while the
    loop is stuck (on a hanging disk, say) is killed from here, before it takes the machine down.
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
        """Sample a worker from now on: its session, and processes outside it with `token` in their environment.

        Replaces an earlier watch of the same run. `brake` kills the worker; it is called in the sampler's thread.
        """
        gauge = Gauge(Processes(session, token), limit_bytes, self._readers)
        with self._changed:
            self._watches[run] = _Watch(run, generation, gauge, Pace(limit_bytes, interval_s), brake)
            self._changed.notify()

    def unwatch(self, run: str) -> None:
        """Stop sampling this run."""
        with self._changed:
            self._watches.pop(run, None)

    def delivered(self) -> None:
        """The event loop has processed a sample."""
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
        start_cpu_s = time.thread_time()
        event: Sample | SampleMissing
        try:
            found = watch.gauge.measure()
            if found is None:  # the worker has ended: no sample is missing, and its exit is reported elsewhere
                watch.due_s = now_s + watch.pace.interval_s
                return
            used_bytes = found.total_bytes
            event = self._sample(watch, found, now_s)
        except Exception as error:  # of any kind: sampling continues, and a failure is not a zero
            event = SampleMissing(now_s, watch.generation, f"{type(error).__name__}: {error}"[:200])
            watch.due_s = now_s + watch.pace.interval_s
        else:
            took_s = time.thread_time() - start_cpu_s  # counting shared pages can be slow: at most half of the time
            watch.due_s = now_s + max(watch.pace.after(used_bytes, now_s), 2 * took_s)
        over = used_bytes > watch.pace.limit_bytes
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
            pressure=self._machine.pressure,
        )

    def _has_room(self, over: bool) -> bool:
        with self._changed:
            # the samples that explain a kill from here must reach the loop
            if self._pending >= (8 if over else 1) * PENDING_AT_MOST:
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
            if stuck and self._watches.get(watch.run) is watch:  # else its pid may have been reused
                watch.brake()
