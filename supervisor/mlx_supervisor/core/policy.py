"""Every threshold of a run, as plain numbers."""

from dataclasses import dataclass, field

MIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class BatchPolicy:
    """`size`: the requested micro-batch in samples; None: the worker reports its own with the first `Ready`.

    `accumulation`: micro-batches per update. `start`: the first micro-batch, doubled after every `grow_after_steps`
    good steps, up to `size`.
    """

    size: int | None = None
    accumulation: int = 1
    preserve_effective: bool = True
    minimum: int = 1
    start: int | None = None
    grow_after_steps: int = 200
    halve_on_leak: bool = True


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
    confirm_samples: int = 2
    soft_share: float = 0.97
    min_slope_bytes: float = 0.25 * MIB
    relief_wait_s: float = 4.0
    missing_samples: int = 20
    clear_first: bool = True
    gradient_checkpointing: str = "last_resort"
    autopsy: bool = True
    autopsy_limit_s: float = 5.0


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """The run fails after `max_without_progress` consecutive generations without a new checkpoint.

    A restart after a crash waits `backoff_s`, doubled each time up to `backoff_max_s`, plus a random share of at
    most `jitter`; memory restarts do not wait. A generation of at least `healthy_s` resets the wait.
    `max_memory_without_progress`: the same limit for generations that memory ended. `max_same_error`: consecutive
    deaths by the same error of the user's code at the same step. `wait_for_memory_s`: how long a start may wait for
    available memory. `reboot_cooldown_s`: the wait after the machine restarted; `max_reboots`: consecutive machine
    restarts without progress.
    """

    max_without_progress: int = 3
    max_memory_without_progress: int = 5
    max_same_error: int = 2
    max_reboots: int = 3
    backoff_s: float = 1.0
    backoff_max_s: float = 60.0
    jitter: float = 0.1
    healthy_s: float = 600.0
    wait_for_memory_s: float = 600.0
    reboot_cooldown_s: float = 60.0
    start_timeout_s: float = 600.0
    stop_grace_s: float = 60.0
    term_grace_s: float = 10.0
    kill_wait_s: float = 10.0
    hang_timeout_s: float | None = None
    close_after_steps: int = 20


@dataclass(frozen=True, slots=True)
class RunPolicy:
    """The thresholds of one run."""

    memory: MemoryPolicy
    batch: BatchPolicy = field(default_factory=BatchPolicy)
    restart: RestartPolicy = field(default_factory=RestartPolicy)
