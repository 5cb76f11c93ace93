"""What the machine is allowed to do: every threshold of a run, as plain numbers."""

from dataclasses import dataclass, field

MIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class BatchPolicy:
    """`size` and `accumulation` as asked, in samples; None: the worker says at its first `Ready`.

    `start`: the size to begin at, doubled after every `grow_after_steps` good steps, up to `size`.
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
    """`limit_bytes` is for the worker's whole process group. `confirm_samples` in a row over it are a hard trip.

    `missing_samples` in a row: the worker is unwatched, and restarted. `clear_first`: a soft trip asks for cleared
    caches before it costs a restart. `gradient_checkpointing`: "never", "last_resort" (when the smallest batch still
    trips for pressure) or "always". `autopsy`: ask what grew, for at most `autopsy_limit_s`.

    `soft_share`: the share of the limit at which the floor plus the usual spikes is near enough for a soft trip.
    `min_slope_bytes`: leaks slower than this, per step, are nobody's business.
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
    """`max_without_progress` lives in a row that add no durable step are the end.

    A restart after a crash waits `backoff_s`, doubled each time up to `backoff_max_s`, longer by a random share of at
    most `jitter`; memory restarts do not wait. A life of `healthy_s` makes the next wait the first again.
    `max_memory_without_progress`: likewise for lives that memory ended. `max_same_error`: ends in a row by the same
    error of the user's code at the same step. `wait_for_memory_s`: how long a start may wait for the machine's memory
    to come back. `reboot_cooldown_s`: wait after the machine restarted; `max_reboots` in a row without
    progress are the end.
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
    """All of one run."""

    memory: MemoryPolicy
    batch: BatchPolicy = field(default_factory=BatchPolicy)
    restart: RestartPolicy = field(default_factory=RestartPolicy)
