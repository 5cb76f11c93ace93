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


@dataclass(frozen=True, slots=True)
class MemoryPolicy:
    """`limit_bytes` is for the worker's whole process group. `confirm_samples` in a row over it are a hard trip.

    `soft_share`: the share of the limit at which the floor plus the usual spikes is near enough for a soft trip.
    `min_slope_bytes`: leaks slower than this, per step, are nobody's business.
    """

    limit_bytes: int
    confirm_samples: int = 2
    soft_share: float = 0.97
    min_slope_bytes: float = 0.5 * MIB
    relief_wait_s: float = 4.0
    missing_samples: int = 20


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """`max_without_progress` lives in a row that add no durable step are the end.

    A restart after a crash waits `backoff_s`, doubled each time up to `backoff_max_s`; memory restarts do not wait.
    """

    max_without_progress: int = 3
    backoff_s: float = 1.0
    backoff_max_s: float = 60.0
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
