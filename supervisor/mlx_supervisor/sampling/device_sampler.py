"""Samples of a device's own memory, from its driver, in a thread of their own: a driver may answer late, or never.

The thread starts with the first worker that names such a device. Without the driver, the workers' reports alone count.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from mlx_supervisor.core.events import DeviceSample
from mlx_supervisor.host.nvidia_driver import Driver, DriverError, open_driver
from mlx_supervisor.host.process_tree import Processes

INTERVAL_S = 0.25
NEAR_INTERVAL_S = 0.05
NEAR_SHARE = 0.7
"""Share of the limit from which on samples are taken every `NEAR_INTERVAL_S`."""
FAILURES_AT_MOST = 20
"""Consecutive failed readings after which the driver is given up for this worker."""

log = structlog.get_logger()
Deliver = Callable[[str, DeviceSample], None]


@dataclass
class _Watch:
    run: str
    generation: int
    uuid: str
    limit_bytes: int
    processes: Processes
    due_s: float = 0.0
    failures: int = 0


class DeviceSampler:
    """Calls `deliver` in its thread. `open_with`: how the driver is opened."""

    def __init__(self, deliver: Deliver, open_with: Callable[[], Driver] = open_driver) -> None:
        self._deliver = deliver
        self._open_with = open_with
        self._driver: Driver | None = None
        self._watches: dict[str, _Watch] = {}
        self._changed = threading.Condition()
        self._closing = False
        self._thread: threading.Thread | None = None

    def watch(self, run: str, generation: int, uuid: str, limit_bytes: int, session: int, token: str = "") -> str:
        """Sample a worker's device from now on. Returns "" or why that is impossible."""
        try:
            self._driver = self._driver or self._open_with()
        except DriverError as error:
            return str(error)
        with self._changed:
            self._watches[run] = _Watch(run, generation, uuid, limit_bytes, Processes(session, token))
            if self._thread is None:
                self._thread = threading.Thread(target=self._loop, name="device-sampler", daemon=True)
                self._thread.start()
            self._changed.notify()
        return ""

    def unwatch(self, run: str) -> None:
        """Stop sampling for this run."""
        with self._changed:
            self._watches.pop(run, None)

    def free_bytes(self, uuid: str) -> int | None:
        """What all processes leave of a device's memory; None: unknown."""
        if self._driver is None:
            return None
        try:
            return self._driver.read(uuid).free_bytes
        except DriverError:
            return None

    def close(self) -> None:
        """End the thread. A driver that hangs does not delay the supervisor's end."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(timeout=1)

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
        assert self._driver is not None
        now_s = time.monotonic()
        watch.due_s = now_s + INTERVAL_S
        try:
            watch.processes.refresh()
            found = self._driver.read(watch.uuid)
        except (DriverError, OSError) as error:
            self._failed(watch, str(error))
            return
        watch.failures = 0
        used_bytes = found.used_by(frozenset((watch.processes.leader, *watch.processes.others)))
        if (used_bytes or 0) > NEAR_SHARE * watch.limit_bytes:
            watch.due_s = now_s + NEAR_INTERVAL_S
        self._deliver(watch.run, DeviceSample(now_s, watch.generation, used_bytes, found.free_bytes, found.total_bytes))

    def _failed(self, watch: _Watch, error: str) -> None:
        watch.failures += 1
        if watch.failures == 1:
            log.warning("device_memory_unreadable", run=watch.run, error=error)
        if watch.failures >= FAILURES_AT_MOST:
            log.error("device_memory_unwatched", run=watch.run, error=error)
            with self._changed:
                if self._watches.get(watch.run) is watch:
                    del self._watches[watch.run]
