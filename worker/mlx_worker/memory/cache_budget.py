"""How much MLX's cache may hold: the limits minus the measured need. Arithmetic only; `cache_policy` applies it."""

HOST_SHARE = 0.85
"""Of the memory limit, for this process: the supervisor also sees spikes between two readings here, its soft trip is at
97 % of the limit, and the user's helper processes count too."""
DEVICE_SHARE = 0.95
"""Of the device limit: MLX's counters leave out fragmentation and libraries' workspaces."""
PRESSURE_SHARE = 0.94
"""Of the memory limit: above it the cache is cleared."""
TIGHT_SHARE = 0.8
"""Of the room: a need above it leaves no space for two overlapping updates."""
CACHE_OVER_NEED = 3.0
"""Largest cache relative to the need, in shared memory: beyond it the cache holds buffers of rare shapes."""
REVIEW_EVERY_STEPS = 16
RAISE_FROM = 1.2
LOWER_FROM = 0.95
"""Factors of the current limit: a new one outside them is set, so that noise does not move it."""
FORGET = 1 / 64
"""Of the distance to the present peak, each step: a single large need is forgotten over time."""
RECOVERY = 1.25
"""Growth of a limit that was cut under pressure, per review without pressure."""


class CacheBudget:
    """The cache's limit, step by step. `limit_bytes`: of the memory that the cache is in.

    `own`: the memory is the device's own, so nothing else of this process counts there. `enforced`: the allocator
    itself keeps active plus cached memory under a limit; then only memory active between updates counts as need, since
    cached buffers become active ones.
    """

    def __init__(self, limit_bytes: int, *, own: bool, enforced: bool) -> None:
        self._limit_bytes, self._own, self._enforced = limit_bytes, own, enforced
        self._share = DEVICE_SHARE if own else HOST_SHARE
        self._relief = 1.0
        self._need_bytes = 0.0
        self._steps = 0
        self.room_bytes = int(self._share * limit_bytes)
        """For active and cached memory together."""
        self.cache_limit_bytes: int | None = None
        """The current limit; None before the first measurement."""

    @property
    def tight(self) -> bool:
        """Whether the need is too close to the room for updates to overlap."""
        return self._need_bytes > TIGHT_SHARE * self.room_bytes

    def add(self, active_bytes: int, peak_bytes: int, other_bytes: int) -> int | None:
        """Record one update: MLX's counters, and this process's other memory. Returns a new limit to set, or None."""
        self._steps += 1
        self._need_bytes = max(peak_bytes, self._need_bytes + FORGET * (peak_bytes - self._need_bytes))
        if self._steps % REVIEW_EVERY_STEPS and self._steps not in (1, 2, 4, 8):
            return None
        self._relief = min(1.0, self._relief * RECOVERY)
        self.room_bytes = max(0, int(self._share * self._limit_bytes) - (0 if self._own else other_bytes))
        return self._move_to(self._target(active_bytes))

    def is_under_pressure(self, active_bytes: int, cache_bytes: int, other_bytes: int) -> bool:
        """Whether the cache must be cleared."""
        total_bytes = active_bytes + cache_bytes + (0 if self._own else other_bytes)
        return cache_bytes > 0 and total_bytes > PRESSURE_SHARE * self._limit_bytes

    def relieve(self) -> int | None:
        """Halve the cache for now, because memory is too full. Returns the limit to set, or None."""
        self._relief = max(self._relief / 2, 1 / 64)
        if self.cache_limit_bytes is None:
            return None
        self.cache_limit_bytes //= 2
        return self.cache_limit_bytes

    def _target(self, active_bytes: int) -> int:
        floor_bytes = active_bytes if self._enforced else self._need_bytes
        free_bytes = max(0.0, self.room_bytes - floor_bytes)
        if not self._own:
            free_bytes = min(free_bytes, CACHE_OVER_NEED * self._need_bytes)
        return int(self._relief * free_bytes)

    def _move_to(self, target_bytes: int) -> int | None:
        now_bytes = self.cache_limit_bytes
        if now_bytes is not None and LOWER_FROM * now_bytes <= target_bytes <= RAISE_FROM * now_bytes:
            return None
        self.cache_limit_bytes = target_bytes
        return target_bytes
