"""The micro-batch (samples in memory at once) and the effective batch (samples of one update)."""

from mlx_supervisor.core.policy import BatchPolicy


class BatchPlan:
    """The micro-batch in use. Halved by memory trips; grown back after good steps, never to a size that tripped."""

    def __init__(
        self,
        policy: BatchPolicy,
        size: int | None = None,
        tripped: frozenset[int] = frozenset(),
        leak_from: int | None = None,
        last_requested: int | None = None,
    ) -> None:
        self._policy = policy
        self.requested = policy.size
        self.requested_effective = None if policy.size is None else policy.size * policy.accumulation
        self.size = size if size is not None else (policy.start or policy.size)
        if (
            self.requested is not None
            and self.size == last_requested
            and not self._has_tripped(self.requested, tripped)
        ):
            self.size = self.requested  # it was not reduced: another request counts at once
        if self.size is not None and self.requested is not None:
            self.size = max(min(self.size, self.requested), self.minimum)
        self.tripped = tripped
        self.leak_from = leak_from
        """The size that a leak halved; None if no leak did."""
        self._good_steps = 0

    @property
    def minimum(self) -> int:
        """The smallest size allowed, in samples."""
        return self._policy.minimum

    @staticmethod
    def _has_tripped(size: int, tripped: frozenset[int]) -> bool:
        return any(size >= each for each in tripped)

    def request(self, size: int, effective: int, current: int) -> None:
        """Take the task's changed request, where the settings leave it open. The worker uses `current` already."""
        if self._policy.size is not None or (self.requested, self.requested_effective) == (size, effective):
            return
        self.requested, self.requested_effective = size, effective
        self.size = min(current, size)
        self._good_steps = 0

    def adopt(self, size: int, effective: int) -> None:
        """Take the worker's own choice as the requested size, where the settings leave it open."""
        if self.requested is None:
            self.requested = size
            self.requested_effective = effective
        if self.size is None:
            self.size = size

    @property
    def effective(self) -> int | None:
        """Samples of one update: as requested, or shrunk with the size if `preserve_effective` is off."""
        if self.size is None or self.requested is None or self.requested_effective is None:
            return None
        if self._policy.preserve_effective:
            return self.requested_effective
        return max(1, self.requested_effective * self.size // self.requested)

    @property
    def at_minimum(self) -> bool:
        """Whether the size can't be halved further."""
        return self.size is not None and self.size <= self.minimum

    @property
    def reduced_for_leak(self) -> bool:
        """Whether a leak already halved the size in use: it does so once."""
        return self.leak_from is not None and self.size is not None and self.size < self.leak_from

    def halve(self, for_pressure: bool) -> bool:
        """Halve the size, down to the minimum. False if it was at the minimum already."""
        self._good_steps = 0
        if self.size is None or self.size <= self.minimum:
            return False
        if for_pressure:
            self.tripped |= {self.size}
        elif not self.reduced_for_leak:
            self.leak_from = self.size
        self.size = max(self.size // 2, self.minimum)
        return True

    def restore(self, size: int) -> None:
        """Return to a larger size that was left for no gain; it and those between may be used again."""
        self._good_steps = 0
        self.tripped = frozenset(each for each in self.tripped if each > size)
        self.size, self.leak_from = size, None

    @property
    def growth_due(self) -> tuple[int, int] | None:
        """The size to grow to, and the healthy steps until then; None if no growth is pending."""
        if self.size is None or self.requested is None or self.size >= self.requested:
            return None
        larger = min(self.size * 2, self.requested)
        if self._has_tripped(larger, self.tripped):
            return None
        return larger, max(self._policy.grow_after_steps - self._good_steps, 1)

    def good_step(self) -> int | None:
        """Count a healthy step; returns the size to grow to when due, else None."""
        due = self.growth_due
        if due is None:
            return None
        larger, steps_left = due
        self._good_steps += 1
        if steps_left > 1:
            return None
        self._good_steps = 0
        self.size = larger
        return larger
