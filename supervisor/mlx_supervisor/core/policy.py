"""Every threshold of a run, as plain numbers. The settings have the defaults."""

from dataclasses import dataclass

MIB = 1024 * 1024
KILL_WAIT_S = 10.0
"""How long after SIGKILL a process group may still exist."""


@dataclass(frozen=True, slots=True)
class BatchPolicy:
    """`size`: the requested micro-batch in samples; None: the worker reports its own with the first `Ready`.

    `accumulation`: micro-batches per update. `start`: the first micro-batch, doubled after every `grow_after_steps`
    good steps, up to `size`.
    """

    size: int | None
    accumulation: int
    preserve_effective: bool
    minimum: int
    start: int | None
    grow_after_steps: int
    halve_on_leak: bool


@dataclass(frozen=True, slots=True)
class MemoryPolicy:
    """`limit_bytes`: for the worker's whole process group. `confirm_samples` consecutive samples over it trip hard.

    `missing_samples`: consecutive failed samples after which the worker is restarted. `clear_first`: a soft trip
    first clears the caches, which may save the restart. `gradient_checkpointing`: "never", "last_resort" (when the
    smallest batch still trips for pressure) or "always". `autopsy`: find what grew, for at most `autopsy_limit_s`.

    `soft_share`: the share of the limit at which the floor plus the usual spikes trips softly.
    `min_slope_bytes`: leaks of fewer bytes per step are ignored.
    """

    limit_bytes: int
    confirm_samples: int
    soft_share: float
    min_slope_bytes: float
    relief_wait_s: float
    missing_samples: int
    clear_first: bool
    gradient_checkpointing: str
    autopsy: bool
    autopsy_limit_s: float


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """The run fails after `max_without_progress` consecutive generations without a new checkpoint.

    A restart after a crash waits `backoff_s`, doubled each time up to `backoff_max_s`, plus a random share of at
    most `jitter`; memory restarts do not wait. A generation of at least `healthy_s` resets the wait.
    `max_memory_without_progress`: the same limit for generations that memory ended. `max_same_error`: consecutive
    deaths by the same error of the user's code at the same step. `max_external`: starts within an hour after deaths by
    other processes. `wait_for_memory_s`: how long a start may wait for available memory. `reboot_cooldown_s`: the wait
    after the machine restarted; `max_reboots`: consecutive machine restarts without progress.
    """

    max_without_progress: int
    max_memory_without_progress: int
    max_same_error: int
    max_external: int
    max_reboots: int
    backoff_s: float
    backoff_max_s: float
    jitter: float
    healthy_s: float
    wait_for_memory_s: float
    reboot_cooldown_s: float
    start_timeout_s: float
    stop_grace_s: float
    term_grace_s: float
    kill_wait_s: float
    hang_timeout_s: float | None
    close_after_steps: int


@dataclass(frozen=True, slots=True)
class RunPolicy:
    """The thresholds of one run. `steps`: requested updates in total; None: only the worker knows their number."""

    memory: MemoryPolicy
    batch: BatchPolicy
    restart: RestartPolicy
    steps: int | None = None
