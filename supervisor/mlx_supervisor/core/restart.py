"""When a restart is worth it: a limit on lives in a row that add nothing durable."""

from mlx_supervisor.core.causes import MEMORY_CAUSES, Cause
from mlx_supervisor.core.policy import RestartPolicy

REFUSED_STARTS_AT_MOST = 60
"""Starts in a row that a full disk or the like may spoil: with the default backoff, about an hour."""


class RestartBudget:
    """Counts lives without progress. Progress is a durable checkpoint beyond every earlier one."""

    def __init__(self, policy: RestartPolicy, barren_lives: int = 0) -> None:
        self._policy = policy
        self.barren_lives = barren_lives
        self._refused_starts = 0

    def start_refused(self) -> float | None:
        """The world did not let us start a worker: how long to wait, in seconds; None when it has refused too often."""
        self._refused_starts += 1
        if self._refused_starts > REFUSED_STARTS_AT_MOST:
            return None
        return min(self._policy.backoff_s * 2.0 ** min(self._refused_starts - 1, 30), self._policy.backoff_max_s)

    def started(self) -> None:
        """A worker could be started."""
        self._refused_starts = 0

    def life_ended(self, *, progress: bool, shrunk: bool) -> bool:
        """True when another life is allowed. A life that ended in a smaller batch is not held against the run."""
        if progress:
            self.barren_lives = 0
        elif not shrunk:
            self.barren_lives += 1
        return self.barren_lives < self._policy.max_without_progress

    def delay_s(self, cause: Cause, *, progress: bool, shrunk: bool) -> float:
        """How long to wait before the next life.

        Not at all when the life that ended saved something new: waiting is for what fails again and again, and a run
        that gets on comes to its end however often it dies. Nor when a memory cause has been met by a smaller batch.
        """
        if cause is Cause.ASKED or progress or (cause in MEMORY_CAUSES and shrunk):
            return 0.0
        doublings = max(self.barren_lives - 1, 0)
        return float(min(self._policy.backoff_s * 2.0 ** min(doublings, 30), self._policy.backoff_max_s))
