"""The keys of the settings file and their defaults: frozen, validated types. Units are in the names."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from mlx_supervisor.settings.sizes import parse_bytes, parse_limit
from mlx_supervisor.wire import DrillJob

Whole = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
Positive = Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=31_536_000)]
Bytes = Annotated[int, msgspec.Meta(extra={"parse": parse_bytes})]
Limit = Annotated[int | float, msgspec.Meta(extra={"parse": parse_limit})]
"""Bytes (int) or a share (float) of a total."""


class TaskSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is trained: an mlx_lm configuration file, or a Python function that builds the task."""

    kind: Literal["mlx_lm", "python"]
    config: str | None = None
    entry: str | None = None
    args: dict[str, Any] = {}
    options: dict[str, Any] = {}
    mlx_lm_compatible: bool = False


class BatchSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The micro-batch, and how it may shrink and grow."""

    size: Positive | None = None
    accumulation: Positive = 1
    preserve_effective: bool = True
    minimum: Positive = 1
    start: Positive | None = None
    grow_after_steps: Positive = 200
    halve_on_leak: bool = True
    sample_log: bool = False

    @property
    def effective(self) -> int | None:
        """The effective batch in samples; None without `size`."""
        return None if self.size is None else self.size * self.accumulation


class MemorySettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The limits, and the treatment of MLX's cache. Shares are of the machine's or the device's memory."""

    limit: Limit = 0.8
    device_limit: Limit = 0.8
    policy: Literal["adaptive", "always", "never"] = "adaptive"
    confirm_samples: Positive = 2
    missing_samples: Positive = 20
    clear_first: bool = True
    gradient_checkpointing: Literal["never", "last_resort", "always"] = "last_resort"
    autopsy: bool = True
    autopsy_limit_s: Annotated[float, msgspec.Meta(gt=0, le=60)] = 5.0
    soft_share: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.97
    leak_mib_per_step: Annotated[float, msgspec.Meta(gt=0, le=1_048_576)] = 0.25
    relief_wait_s: Seconds = 4.0
    sample_interval_s: Annotated[float, msgspec.Meta(ge=0.005, le=10)] = 0.05
    clear_before_gradients: bool = False
    clear_after_gradients: bool = False
    clear_after_update: bool = True
    release_pause_s: Annotated[float, msgspec.Meta(ge=0, le=10)] = 0.0
    cache_limit: Bytes | None = None


class CheckpointSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """When a checkpoint is taken, and how many are kept. Without an `every_…`, `overhead` decides (see `wire`)."""

    overhead: Annotated[float, msgspec.Meta(gt=0, le=0.5)] = 0.01
    every_steps: Whole | None = None
    every_seconds: Seconds | None = None
    keep: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 3
    keep_best: bool = False

    @property
    def automatic(self) -> bool:
        """Whether no interval is set."""
        return self.every_steps is None and self.every_seconds is None


class RestartSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Waits, and when the run fails."""

    max_without_progress: Positive = 3
    max_memory_without_progress: Positive = 5
    max_same_error: Positive = 2
    max_external: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 20
    max_reboots: Positive = 3
    backoff_s: Seconds = 1.0
    backoff_max_s: Seconds = 60.0
    jitter: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.1
    healthy_s: Seconds = 600.0
    wait_for_memory_s: Seconds = 600.0
    reboot_cooldown_s: Seconds = 60.0
    start_timeout_s: Annotated[float, msgspec.Meta(gt=0, le=31_536_000)] = 600.0
    stop_grace_s: Seconds = 60.0
    term_grace_s: Seconds = 10.0
    hang_timeout_s: Annotated[float, msgspec.Meta(gt=0, le=31_536_000)] | None = None
    close_after_steps: Positive = 20


class RunSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One run."""

    task: TaskSettings
    seed: Whole | None = None
    steps: Positive | None = None
    autostart: bool = False
    stop_on_not_finite: bool = True
    deterministic: bool = False
    max_grad_norm: Annotated[float, msgspec.Meta(ge=0, le=1e9)] | None = None
    ema_decay: Annotated[float, msgspec.Meta(ge=0, lt=1)] | None = None
    batch: BatchSettings = BatchSettings()
    memory: MemorySettings = MemorySettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    restart: RestartSettings = RestartSettings()
    drill: DrillJob = DrillJob()


@dataclass(frozen=True)
class Settings:
    """The whole file, read from `path`; relative paths in it start at `base_dir`, by default its folder.

    `typed`: the keys of `task.options` that come from the command line. `fresh`: identifies a start with `--fresh`.
    `bare`: the runs have no supervisor and no folder.
    """

    path: Path
    state_dir: Path
    runs: dict[str, RunSettings]
    base: Path | None = None
    typed: frozenset[str] = frozenset()
    fresh: str = ""
    bare: bool = False

    @property
    def base_dir(self) -> Path:
        """The folder where relative paths start."""
        return self.path.parent if self.base is None else self.base

    def run_dir(self, name: str) -> Path:
        """The run's folder, which may not exist yet."""
        return self.state_dir / "runs" / name


class SettingsError(ValueError):
    """A settings file that cannot be used. `problems`: every problem, a sentence each, at most 51."""

    def __init__(self, problems: list[str], path: Path | None = None) -> None:
        self.problems = problems
        self.path = path
        lines = [f"{path}: {problem}" if path else problem for problem in problems]
        super().__init__("\n".join(lines))
