"""Whether enough of a device's own memory is free for a start.

A start waits, for at most `restart.wait_for_memory_s`, until 90 % of what the last generation held without its cache is
free; after other processes took the memory, until 125 % is, as what the run held then was not enough. Never more than
the limit. A run waits only once for memory that other processes keep.
"""

from mlx_supervisor.core.words import size

NEED_SHARE = 0.9
CROWDED_NEED_SHARE = 1.25


class DeviceWait:
    """One per run. `need_bytes`: what the last generation held at most. Without a reading a start never waits."""

    def __init__(self) -> None:
        self.limit_bytes = self.need_bytes = 0
        self.free_bytes: int | None = None
        self._crowded = False
        self._accepted_bytes: int | None = None

    def crowd(self) -> bool:
        """Other processes took the memory. False if the run waited for it in vain: then it must need less."""
        self._crowded = self._accepted_bytes is None
        return self._crowded

    def update(self, free_bytes: int | None) -> None:
        """Take a reading while the run has no worker; None: there is none."""
        self.free_bytes = free_bytes
        if free_bytes is not None and free_bytes >= self._needed_bytes:
            self._accepted_bytes = None

    def worker_started(self) -> None:
        """Discard the reading, which is now out of date."""
        self.free_bytes, self._crowded = None, False

    def accept(self) -> None:
        """The wait is over: what is free now must do."""
        if self.must_wait:
            self._accepted_bytes = self.free_bytes

    @property
    def _needed_bytes(self) -> int:
        share = CROWDED_NEED_SHARE if self._crowded else NEED_SHARE
        return min(int(share * self.need_bytes), self.limit_bytes)

    @property
    def required_bytes(self) -> int:
        """What must be free for a start, in bytes."""
        accepted_bytes = self._accepted_bytes
        return self._needed_bytes if accepted_bytes is None else min(self._needed_bytes, accepted_bytes)

    @property
    def must_wait(self) -> bool:
        """Whether a start should wait: too little is free."""
        return self.free_bytes is not None and self.free_bytes < self.required_bytes

    @property
    def figures(self) -> str:
        """The free memory, with what is required."""
        return f"{size(self.free_bytes or 0)} of the device's memory free, {size(self.required_bytes)} required"
