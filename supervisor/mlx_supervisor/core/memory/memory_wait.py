"""Has the machine's memory come back since the last worker died?

Some systems give memory back late, or not at all (GPU memory can stay wired after a SIGKILL), and a worker that starts
into what is left dies of it. So a start waits until 80 % of what was available before this supervisor's first start is
available again, or 90 % of what the last life needed, whichever is less, but never for more than the limit. The wait
is bounded, and what was there at the end of one in vain is the measure from then on: where another program holds the
memory, a run waits for it once.
"""

from mlx_supervisor.core.events import MemoryPressure

BASELINE_SHARE = 0.8
"""Of what was available before the first start: other programs come and go."""
NEED_SHARE = 0.9
"""Of the last life's highest footprint: less is known to be too little, more is the breaker's business."""


class MemoryWait:
    """One per run and supervisor. Without a reading nothing is waited for."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._baseline_bytes: int | None = None
        self._pressure = MemoryPressure.NORMAL
        self.available_bytes: int | None = None

    def look(self, available_bytes: int, pressure: MemoryPressure) -> None:
        """A reading of the machine while no worker of ours runs."""
        self.available_bytes = available_bytes
        self._pressure = pressure

    def started(self) -> None:
        """A worker starts: readings from before say nothing any more, but for the first, which is the baseline."""
        if self._baseline_bytes is None:
            self._baseline_bytes = self.available_bytes
        self.available_bytes = None

    def accept(self) -> None:
        """What is there has to do, now and later."""
        if self._baseline_bytes is not None and self.available_bytes is not None:
            self._baseline_bytes = min(self._baseline_bytes, self.available_bytes)

    def required_bytes(self, need_bytes: int) -> int:
        """What has to be available; `need_bytes` is the highest footprint of the last life."""
        if self._baseline_bytes is None:
            return 0
        return int(min(BASELINE_SHARE * self._baseline_bytes, NEED_SHARE * need_bytes, self._limit_bytes))

    def short(self, need_bytes: int) -> bool:
        """Whether a start should wait: too little is there, or the system itself is in distress."""
        if self.available_bytes is None:
            return False
        return self._pressure is MemoryPressure.CRITICAL or self.available_bytes < self.required_bytes(need_bytes)

    def words(self, need_bytes: int) -> str:
        """What there is of what is wanted."""
        there, wanted = (self.available_bytes or 0) / 2**30, self.required_bytes(need_bytes) / 2**30
        if (self.available_bytes or 0) < self.required_bytes(need_bytes):
            return f"{there:.1f} of {wanted:.1f} GiB available"
        return f"{there:.1f} GiB available, memory pressure {self._pressure.value}"
