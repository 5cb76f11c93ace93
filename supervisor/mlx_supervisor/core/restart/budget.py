"""Whether to restart, and how long to wait before it.

Every limit counts consecutive generations without a new checkpoint; progress resets the counts. Generations that
memory or other processes ended, crashes, and restarts of the machine are counted separately. The counts are in the
run's history, so they survive the supervisor.
"""

from random import Random

from mlx_supervisor.core.diagnosis.causes import MEMORY_CAUSES, Cause
from mlx_supervisor.core.history import RunHistory
from mlx_supervisor.core.policy import RestartPolicy
from mlx_supervisor.core.restart import external

REFUSED_STARTS_AT_MOST = 60
"""Consecutive failed starts (a full disk, no process available): with the default backoff, about an hour."""
NOT_FINITE_AT_MOST = 2
"""Non-finite losses at the same update: a failed buffer may explain the first, but not the second."""
OF_MEMORY = MEMORY_CAUSES | {Cause.RESOURCE_LIMIT}
"""Causes with the larger budget: a restart alone often cures them."""
DOUBLINGS_AT_MOST = 30


class RestartBudget:
    """Counts generations without progress. Progress is a durable checkpoint beyond every earlier one.

    `seed`: a number of the run's own, so that runs that died together restart at different times.
    """

    def __init__(self, policy: RestartPolicy, history: RunHistory | None = None, seed: int = 0) -> None:
        self._policy = policy
        self._past = history or RunHistory()
        self._seed = seed
        self._refused_starts = 0

    def reset(self) -> None:
        """A person started or restarted the run: every count begins again."""
        past = self._past
        past.without_progress = past.memory_without_progress = 0
        past.waits = past.reboots = past.same_errors = past.external_without_progress = 0
        past.external_s = []

    def start_refused(self) -> float | None:
        """A start failed for a passing reason: seconds until the next attempt; None after too many."""
        self._refused_starts += 1
        if self._refused_starts > REFUSED_STARTS_AT_MOST:
            return None
        return self._wait_s(self._refused_starts - 1)

    def started(self) -> None:
        """A worker was started."""
        self._refused_starts = 0

    def generation_ended(
        self, cause: Cause, *, progress: bool, eased: bool = False, uptime_s: float = 0.0, at_s: float = 0.0
    ) -> str | None:
        """Why to give up, or None. A memory death is not counted when the next generation needs less (`eased`)."""
        past = self._past
        if progress or uptime_s >= self._policy.healthy_s:
            past.waits = 0
        if progress:
            past.without_progress = past.memory_without_progress = past.reboots = 0
            past.external_without_progress = 0
            return None
        if cause in external.EXTERNAL_CAUSES:
            return external.note(past, at_s, self._policy.max_external)
        if cause in OF_MEMORY:
            past.memory_without_progress += not eased
            count, at_most = past.memory_without_progress, self._policy.max_memory_without_progress
            which = ", ended by memory (restart.max_memory_without_progress)"
        else:
            past.without_progress += 1
            count, at_most = past.without_progress, self._policy.max_without_progress
            which = " (restart.max_without_progress)"
        generations = "1 generation" if count == 1 else f"{count} consecutive generations"
        return f"{generations} without a new checkpoint{which}" if count >= at_most else None

    def rebooted(self, *, progress: bool) -> str | None:
        """The machine restarted during the run: why to give up, or None."""
        past = self._past
        past.reboots = 0 if progress else past.reboots + 1
        if past.reboots < self._policy.max_reboots:
            return None
        return (
            f"{past.reboots} consecutive machine restarts during this run without a new checkpoint "
            f"(restart.max_reboots)"
        )

    def repeated(self, cause: Cause, error_key: str, step: int) -> bool:
        """Whether the same error came too often in a row at the same step. `error_key` "": no such error."""
        past = self._past
        key = cause.value if cause is Cause.NOT_FINITE else error_key
        same = bool(key) and (key, step) == (past.last_error, past.last_error_step)
        past.same_errors = past.same_errors + 1 if same else int(bool(key))
        past.last_error, past.last_error_step = key, step
        at_most = NOT_FINITE_AT_MOST if cause is Cause.NOT_FINITE else self._policy.max_same_error
        return past.same_errors >= at_most

    def delay_s(self, cause: Cause, *, progress: bool, eased: bool, at_s: float = 0.0) -> float:
        """Seconds to wait before the next generation.

        0 after progress: such a run completes however often it dies, so waiting only costs time. 0 after a memory cause
        when the next generation needs less memory.
        """
        if cause is Cause.REQUESTED or progress or (cause in MEMORY_CAUSES and eased):
            return 0.0
        self._past.waits += 1
        wait_s = self._wait_s(self._past.waits - 1)
        if cause in external.EXTERNAL_CAUSES:
            return max(wait_s, external.wait_s(self._past, at_s, self._policy.max_external))
        return wait_s

    def _wait_s(self, doublings: int) -> float:
        policy = self._policy
        wait_s = min(policy.backoff_s * 2.0 ** min(doublings, DOUBLINGS_AT_MOST), policy.backoff_max_s)
        share = Random(f"{self._past.generation} {self._seed}").random()  # noqa: S311 - for jitter
        return float(wait_s * (1 + policy.jitter * share))
