"""When a restart is worth it, and how long to wait for it.

Every limit is on lives in a row that add nothing durable; progress wipes the slate. Lives that memory ended are counted
apart from crashes, and restarts of the machine apart from both. The counters are in the run's history, so they outlive
the supervisor.
"""

from mlx_supervisor.core.diagnosis.causes import MEMORY_CAUSES, Cause
from mlx_supervisor.core.history import RunHistory
from mlx_supervisor.core.policy import RestartPolicy

REFUSED_STARTS_AT_MOST = 60
"""Starts in a row that a full disk or the like may spoil: with the default backoff, about an hour."""
NOT_FINITE_AT_MOST = 2
"""Ends at the same update by a loss that is not finite: a failed buffer may explain the first, nothing the second."""
OF_MEMORY = MEMORY_CAUSES | {Cause.RESOURCE_LIMIT}
"""Causes with the larger budget: a restart alone often cures them."""
DOUBLINGS_AT_MOST = 30


class RestartBudget:
    """Counts lives without progress. Progress is a durable checkpoint beyond every earlier one.

    `seed`: a number of the run's own, so that runs that died together don't start together.
    """

    def __init__(self, policy: RestartPolicy, history: RunHistory | None = None, seed: int = 0) -> None:
        self._policy = policy
        self._past = history or RunHistory()
        self._seed = seed
        self._refused_starts = 0

    def forget(self) -> None:
        """A person wants it to go on: every count begins again."""
        past = self._past
        past.fruitless_generations = past.fruitless_memory_generations = past.waits = past.reboots = (
            past.same_errors
        ) = 0

    def start_refused(self) -> float | None:
        """The world did not let us start a worker: how long to wait, in seconds; None when it has refused too often."""
        self._refused_starts += 1
        if self._refused_starts > REFUSED_STARTS_AT_MOST:
            return None
        return self._wait_s(self._refused_starts - 1)

    def started(self) -> None:
        """A worker could be started."""
        self._refused_starts = 0

    def generation_ended(
        self, cause: Cause, *, progress: bool, eased: bool = False, lived_s: float = 0.0
    ) -> str | None:
        """Why there is no other life, or None. A life that ended in less need of memory (`eased`) is not counted."""
        past = self._past
        if progress or lived_s >= self._policy.healthy_s:
            past.waits = 0
        if progress:
            past.fruitless_generations = past.fruitless_memory_generations = past.reboots = 0
            return None
        if cause in OF_MEMORY:
            past.fruitless_memory_generations += not eased
            if past.fruitless_memory_generations < self._policy.max_memory_without_progress:
                return None
            which = f"{past.fruitless_memory_generations} lives in a row saved nothing new, ended by memory"
            return f"{which} (restart.max_memory_without_progress)"
        past.fruitless_generations += 1
        if past.fruitless_generations < self._policy.max_without_progress:
            return None
        return f"{past.fruitless_generations} lives in a row saved nothing new (restart.max_without_progress)"

    def rebooted(self, *, progress: bool) -> str | None:
        """The machine restarted under the run: why there is no other life, or None."""
        past = self._past
        past.reboots = 0 if progress else past.reboots + 1
        if past.reboots < self._policy.max_reboots:
            return None
        return (
            f"the machine restarted {past.reboots} times in a row under this run, which saved nothing new "
            f"(restart.max_reboots)"
        )

    def repeated(self, cause: Cause, error_key: str, step: int) -> bool:
        """Whether the same error at the same step has come too often in a row. `error_key` "": no such error."""
        past = self._past
        key = cause.value if cause is Cause.NOT_FINITE else error_key
        same = bool(key) and (key, step) == (past.last_error, past.last_error_step)
        past.same_errors = past.same_errors + 1 if same else int(bool(key))
        past.last_error, past.last_error_step = key, step
        at_most = NOT_FINITE_AT_MOST if cause is Cause.NOT_FINITE else self._policy.max_same_error
        return past.same_errors >= at_most

    def delay_s(self, cause: Cause, *, progress: bool, eased: bool) -> float:
        """How long to wait before the next life.

        Not at all when the life that ended saved something new: waiting is for what fails again and again, and a run
        that gets on comes to its end however often it dies. Nor when a memory cause has been met by needing less.
        """
        if cause is Cause.REQUESTED or progress or (cause in MEMORY_CAUSES and eased):
            return 0.0
        self._past.waits += 1
        return self._wait_s(self._past.waits - 1)

    def _wait_s(self, doublings: int) -> float:
        policy = self._policy
        wait_s = min(policy.backoff_s * 2.0 ** min(doublings, DOUBLINGS_AT_MOST), policy.backoff_max_s)
        return float(wait_s * (1 + policy.jitter * share_of_chance(self._past.generation, self._seed)))


def share_of_chance(generation: int, seed: int) -> float:
    """A number from 0 up to 1 that looks random and is always the same for the same two (SplitMix64's finalizer)."""
    mask = 2**64 - 1
    mixed = (generation * 0x9E3779B97F4A7C15 + seed * 0xD1B54A32D192ED03) & mask
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & mask
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & mask
    return (mixed ^ (mixed >> 31)) / 2.0**64
