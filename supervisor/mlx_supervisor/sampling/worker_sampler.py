"""Memory samples of the workers, taken in a separate thread so that a busy event loop can't delay them.

The thread also ends a worker that passes its limit: between the reading that decides and the signal it takes no lock,
calls no other code, and waits for no other thread.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from mlx_supervisor.core.events import MemoryPressure, Sample, SampleMissing
from mlx_supervisor.core.memory.headroom import Overrun
from mlx_supervisor.host import memory
from mlx_supervisor.host.footprint import Footprint, Gauge, readers
from mlx_supervisor.host.memory import MachineMemory
from mlx_supervisor.host.process_tree import Processes
from mlx_supervisor.sampling import priority
from mlx_supervisor.sampling.pace import Pace

MACHINE_INTERVAL_S = 1.0
"""How often the machine's memory is read."""
PENDING_AT_MOST = 64
"""Samples that a stalled event loop has not processed; further ones are dropped."""
PENDING_OVER_AT_MOST = 512
"""The same for samples over the limit: those that explain a kill must reach the event loop."""
EXPLAIN_S = 1.0
"""How long `unwatch` waits for the sample that explains a kill."""

NOT_READ = MachineMemory(0, MemoryPressure.NORMAL)
Deliver = Callable[[str, Sample | SampleMissing], None]


@dataclass
class _Watch:
    run: str
    generation: int
    gauge: Gauge
    pace: Pace
    overrun: Overrun
    kill: Callable[[], None]
    due_s: float = 0.0
    killing: bool = False
    explained: threading.Event = field(default_factory=threading.Event)
    """Set once the sample for which the worker was killed has been delivered."""


class WorkerSampler:
    """Calls `deliver` in the sampler's thread; `delivered` must be called once a sample has been processed.

    The event loop decides what to do about a sample, with one exception: a worker with `confirm_samples` consecutive
    samples over its limit is killed from here. The state machine applies the same rule to the same samples, so it comes
    to the same decision a moment later, and records it.
    """

    def __init__(self, deliver: Deliver) -> None:
        self._deliver = deliver
        readers()  # so that a system without the library is refused at the start
        self._machine, self._machine_due_s = NOT_READ, 0.0
        self._watches: dict[str, _Watch] = {}
        self._changed = threading.Condition()
        self._closing = False
        self._sent = self._processed = 0  # each written by one thread only, so without a lock
        self._thread = threading.Thread(target=self._run, name="sampler", daemon=True)
        self._thread.start()

    def watch(
        self,
        run: str,
        generation: int,
        session: int,
        limit_bytes: int,
        interval_s: float,
        kill: Callable[[], None] = lambda: None,
        token: str = "",
        confirm_samples: int = 2,
    ) -> None:
        """Sample a worker from now on: its session, and processes outside it with `token` in their environment.

        Replaces an earlier watch of the same run. `kill` ends the worker, and does nothing once that has been reaped;
        it is called in the sampler's thread, after `confirm_samples` consecutive samples over the limit.
        """
        gauge = Gauge(Processes(session, token), limit_bytes, readers())
        overrun = Overrun(limit_bytes, confirm_samples)
        with self._changed:
            self._watches[run] = _Watch(run, generation, gauge, Pace(limit_bytes, interval_s), overrun, kill)
            self._changed.notify()

    def unwatch(self, run: str) -> None:
        """Stop sampling this run. If its worker was killed from here, its last sample has been delivered then."""
        with self._changed:
            watch = self._watches.pop(run, None)
        if watch is not None and watch.killing:
            watch.explained.wait(EXPLAIN_S)

    def delivered(self) -> None:
        """The event loop has processed a sample."""
        self._processed += 1

    def close(self) -> None:
        """End the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout=5)

    def _run(self) -> None:
        priority.prefer_this_thread()
        threads = priority.Threads()
        threads_due_s = 0.0
        while True:
            with self._changed:
                if self._closing:
                    return
                now_s = time.monotonic()
                due = [watch for watch in self._watches.values() if watch.due_s <= now_s]
                if not due:
                    if now_s >= threads_due_s:
                        threads_due_s = now_s + MACHINE_INTERVAL_S
                        threads.refresh()
                    next_s = min((watch.due_s for watch in self._watches.values()), default=None)
                    self._changed.wait(None if next_s is None else next_s - now_s)
                    continue
            for watch in due:
                self._take(watch)

    def _take(self, watch: _Watch) -> None:
        now_s, start_cpu_s = time.monotonic(), time.thread_time()
        event: Sample | SampleMissing
        over = False
        try:
            found = watch.gauge.measure()
            if found is None:  # the worker has ended: no sample is missing, and its exit is reported elsewhere
                watch.due_s = now_s + watch.pace.interval_s
                return
            if watch.overrun.add(found.total_bytes):
                watch.killing = True
                watch.kill()
            over = found.total_bytes > watch.pace.limit_bytes
            event = self._sample(watch, found, now_s, over)
        except Exception as error:  # of any kind: sampling continues, and a failure is not a zero
            event = SampleMissing(now_s, watch.generation, f"{type(error).__name__}: {error}"[:200])
            watch.due_s = now_s + watch.pace.interval_s
        else:
            took_s = time.thread_time() - start_cpu_s  # counting shared pages can be slow: at most half of the time
            watch.due_s = now_s + max(watch.pace.after(found.total_bytes, now_s), 2 * took_s)
        if self._sent - self._processed < (PENDING_OVER_AT_MOST if over else PENDING_AT_MOST):
            self._sent += 1
            self._deliver(watch.run, event)
        if watch.killing:
            watch.explained.set()

    def _sample(self, watch: _Watch, found: Footprint, now_s: float, over: bool) -> Sample:
        if now_s >= self._machine_due_s and not over:  # reading it may delay the next sample
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
