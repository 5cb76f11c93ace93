"""How much MLX's cache may hold: what the limits leave over the measured need. Arithmetic only; `memory` applies it."""

HOST_SHARE = 0.85
"""Of the memory limit, for this process: the supervisor sees spikes that come and go between two looks of ours, its
soft trip is at 97 % of the limit, and the user's helper processes count too."""
DEVICE_SHARE = 0.95
"""Of the device limit: fragments and libraries' workspaces are not in MLX's counters."""
PRESSURE_SHARE = 0.94
"""Of the memory limit: from here on the cache is cleared outright."""
TIGHT_SHARE = 0.8
"""Of the room: a need above it leaves no space for two updates at once."""
CACHE_OVER_NEED = 3.0
"""In memory that others use too, a larger cache is worth little: it holds buffers of shapes that are rare."""
LOOK_EVERY_STEPS = 16
RAISE_FROM = 1.2
LOWER_FROM = 0.95
"""A new limit is set when it differs this much from the one in force, so that noise does not move it."""
FORGET = 1 / 64
"""Of the distance to the present peak, each step: a need that was large once does not bind for good."""
RECOVERY = 1.25
"""Per look without pressure, what was taken off under pressure comes back by this factor."""


class CacheBudget:
    """The cache's limit, step by step. `limit_bytes`: of the memory that the cache is in.

    `own`: the memory is the device's own, so nothing else of this process counts there. `enforced`: the allocator
    keeps active and cached memory together under a limit by itself; then only what is active between updates counts
    as need, since cached buffers become active ones.
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
        """What is in force; None before the first measurement."""

    @property
    def tight(self) -> bool:
        """Whether the need is so close to the room that updates must not overlap."""
        return self._need_bytes > TIGHT_SHARE * self.room_bytes

    def add(self, active_bytes: int, peak_bytes: int, other_bytes: int) -> int | None:
        """One update is done: MLX's counters, and what this process holds besides. The limit to set, if a new one."""
        self._steps += 1
        self._need_bytes = max(peak_bytes, self._need_bytes + FORGET * (peak_bytes - self._need_bytes))
        if self._steps % LOOK_EVERY_STEPS and self._steps not in (1, 2, 4, 8):
            return None
        self._relief = min(1.0, self._relief * RECOVERY)
        self.room_bytes = max(0, int(self._share * self._limit_bytes) - (0 if self._own else other_bytes))
        return self._move_to(self._wanted(active_bytes))

    def is_under_pressure(self, active_bytes: int, cache_bytes: int, other_bytes: int) -> bool:
        """Whether clearing the cache would help, and has to."""
        total_bytes = active_bytes + cache_bytes + (0 if self._own else other_bytes)
        return cache_bytes > 0 and total_bytes > PRESSURE_SHARE * self._limit_bytes

    def relieve(self) -> int | None:
        """Somebody found the memory too full: half of the cache for now. The limit to set, if there is one."""
        self._relief = max(self._relief / 2, 1 / 64)
        if self.cache_limit_bytes is None:
            return None
        self.cache_limit_bytes //= 2
        return self.cache_limit_bytes

    def _wanted(self, active_bytes: int) -> int:
        floor_bytes = active_bytes if self._enforced else self._need_bytes
        free_bytes = max(0.0, self.room_bytes - floor_bytes)
        if not self._own:
            free_bytes = min(free_bytes, CACHE_OVER_NEED * self._need_bytes)
        return int(self._relief * free_bytes)

    def _move_to(self, wanted_bytes: int) -> int | None:
        now_bytes = self.cache_limit_bytes
        if now_bytes is not None and LOWER_FROM * now_bytes <= wanted_bytes <= RAISE_FROM * now_bytes:
            return None
        self.cache_limit_bytes = wanted_bytes
        return wanted_bytes
