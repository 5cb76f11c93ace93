"""How often a worker's memory is sampled.

The interval follows the headroom over the fastest expected growth (as in earlyoom): the configured interval far from
the limit, down to `LEAST_INTERVAL_S` near it.
"""

LEAST_INTERVAL_S = 0.002
EXPECTED_BYTES_PER_S = 512 * 1024 * 1024
"""Growth that is always expected, in bytes per second; faster growth replaces it once seen."""
SAMPLES_BEFORE_LIMIT = 4
"""Samples to take before expected growth reaches the limit."""


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
