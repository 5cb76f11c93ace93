"""The TOML file as frozen, validated types. Units are in the names; sizes are bytes once parsed."""

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from mlx_supervisor.core.policy import BatchPolicy, MemoryPolicy, RestartPolicy, RunPolicy

Name = Annotated[str, msgspec.Meta(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Whole = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
Positive = Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=31_536_000)]


class TaskSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is trained: an mlx_lm configuration file, or a Python function that builds the task."""

    kind: Literal["mlx_lm", "python"]
    config: str | None = None
    entry: str | None = None
    args: dict[str, Any] = {}


class BatchSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Samples in memory at once, and how they may shrink and grow."""

    size: Positive | None = None
    accumulation: Positive = 1
    preserve_effective: bool = True
    minimum: Positive = 1
    start: Positive | None = None
    grow_after_steps: Positive = 200
    sample_log: bool = False


class MemorySettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The limit, and when the worker clears MLX's cache.

    `limit`: bytes (int), a size ("18 GiB"), or a share of the machine's memory ("80%", or a float up to 1).
    """

    limit: int | float | str = "80%"
    confirm_samples: Positive = 2
    soft_share: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.97
    leak_mib_per_step: Annotated[float, msgspec.Meta(gt=0)] = 0.5
    relief_wait_s: Seconds = 4.0
    sample_interval_s: Annotated[float, msgspec.Meta(ge=0.005, le=10)] = 0.05
    clear_before_gradients: bool = False
    clear_after_gradients: bool = False
    clear_after_update: bool = True
    release_pause_s: Annotated[float, msgspec.Meta(ge=0, le=10)] = 0.0
    cache_limit: int | str | None = None


class CheckpointSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """When a checkpoint is taken, and how many stay."""

    every_steps: Whole = 0
    every_seconds: Seconds = 60.0
    keep: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 3


class RestartSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How long to wait, and when to give up."""

    max_without_progress: Positive = 3
    backoff_s: Seconds = 1.0
    backoff_max_s: Seconds = 60.0
    start_timeout_s: Annotated[float, msgspec.Meta(gt=0)] = 600.0
    stop_grace_s: Seconds = 60.0
    term_grace_s: Seconds = 10.0
    hang_timeout_s: Annotated[float, msgspec.Meta(gt=0)] | None = None
    close_after_steps: Positive = 20


class DrillSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Deliberate faults; see `wire.DrillJob`, which has the same fields."""

    generations: list[Positive] = []
    leak_mib_per_step: Seconds = 0.0
    leak_kind: Literal["arrays", "native"] = "arrays"
    leak_from_step: Whole = 0
    allocate_mib: Whole = 0
    allocate_at_step: Whole | None = None
    crash_at_step: Whole | None = None
    hang_at_step: Whole | None = None
    hang_kind: Literal["python", "native"] = "python"
    ignore_sigterm: bool = False
    slow_start_s: Seconds = 0.0


class RunSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One run."""

    task: TaskSettings
    seed: Whole = 0
    steps: Positive | None = None
    autostart: bool = False
    batch: BatchSettings = BatchSettings()
    memory: MemorySettings = MemorySettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    restart: RestartSettings = RestartSettings()
    drill: DrillSettings = DrillSettings()


@dataclass(frozen=True)
class Settings:
    """The whole file. `path` is where it was read; relative paths in it start at its folder."""

    path: Path
    state_dir: Path
    runs: dict[str, RunSettings]
