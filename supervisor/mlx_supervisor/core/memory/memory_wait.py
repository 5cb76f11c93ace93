"""Whether enough of the machine's memory is available for a start.

Some systems free memory late, or not before a reboot (GPU memory can stay wired after a SIGKILL), and a worker that
starts without it dies. So a start waits until the available memory reaches 80 % of the baseline (what was available
before this supervisor's first start), 90 % of the last generation's peak footprint, or the limit, whichever is least.
The wait is bounded. After a timeout the memory available then becomes the baseline: a run waits only once for memory
that another program holds.
"""

from mlx_supervisor.core.events import MemoryPressure
from mlx_supervisor.core.words import size

BASELINE_SHARE = 0.8
"""Share of the baseline; the rest allows for other programs."""
NEED_SHARE = 0.9
"""Share of the last generation's peak footprint. Less is known to be too little; the breaker handles more."""


class MemoryWait:
    """One per run and supervisor. Without a reading a start never waits."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._baseline_bytes: int | None = None
        self._pressure = MemoryPressure.NORMAL
        self.available_bytes: int | None = None

    def update(self, available_bytes: int, pressure: MemoryPressure) -> None:
        """Take a reading of the machine while no worker of this run is alive."""
        self.available_bytes = available_bytes
        self._pressure = pressure

    def worker_started(self) -> None:
        """Discard the reading, which is now out of date; the first one becomes the baseline."""
        if self._baseline_bytes is None:
            self._baseline_bytes = self.available_bytes
        self.available_bytes = None

    def accept(self) -> None:
        """Lower the baseline to what is available now."""
        if self._baseline_bytes is not None and self.available_bytes is not None:
            self._baseline_bytes = min(self._baseline_bytes, self.available_bytes)

    def required_bytes(self, need_bytes: int) -> int:
        """What must be available for a start; `need_bytes` is the last generation's peak footprint."""
        if self._baseline_bytes is None:
            return 0
        return int(min(BASELINE_SHARE * self._baseline_bytes, NEED_SHARE * need_bytes, self._limit_bytes))

    def must_wait(self, need_bytes: int) -> bool:
        """Whether a start should wait: too little memory is available, or memory pressure is critical."""
        if self.available_bytes is None:
            return False
        return self._pressure is MemoryPressure.CRITICAL or self.available_bytes < self.required_bytes(need_bytes)

    def figures(self, need_bytes: int) -> str:
        """The available memory, with what is required or the memory pressure."""
        available_bytes, required_bytes = self.available_bytes or 0, self.required_bytes(need_bytes)
        if available_bytes < required_bytes:
            return f"{size(available_bytes)} available, {size(required_bytes)} required"
        return f"{size(available_bytes)} available, memory pressure {self._pressure.value}"
