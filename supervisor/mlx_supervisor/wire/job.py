"""The worker's job: all that it is told at its start, in `job.json` of its run's folder."""

from typing import Annotated, Any, Literal

import msgspec

from mlx_supervisor.wire.fields import Count, M, Positive, RunName, Seconds, WireError

JOB_LIMIT_BYTES = 1024 * 1024


class BatchJob(msgspec.Struct, frozen=True, kw_only=True):
    """`size`: samples in memory at once; `effective`: samples of one update. None: the task's configuration decides.

    `sample_log`: append the ids of every update's samples to `samples.jsonl` in the run's folder.
    """

    size: Positive | None = None
    effective: Positive | None = None
    preserve_effective: bool = True
    sample_log: bool = False


class MemoryJob(msgspec.Struct, frozen=True, kw_only=True):
    """What becomes of MLX's cache; `release_pause_s` is waited after each clearing.

    `policy` "adaptive": it may hold what the limits leave over the measured need. "always": it is cleared at the points
    named by `clear_…`, which otherwise mean nothing. "never": MLX's own limits, and nothing else.
    `limit_bytes`: what the supervisor allows the worker's process group; None: nobody watches.
    `device_limit_bytes`, or else `device_limit_share` of what it has: for a device with memory of its own.
    `gradient_checkpointing`: compute activations again in the backward pass instead of keeping them.
    """

    policy: Literal["adaptive", "always", "never"] = "adaptive"
    clear_before_gradients: bool = False
    clear_after_gradients: bool = False
    clear_after_update: bool = True
    release_pause_s: Seconds = 0.0
    cache_limit_bytes: Count | None = None
    limit_bytes: Count | None = None
    device_limit_bytes: Count | None = None
    device_limit_share: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.8
    gradient_checkpointing: bool = False


class CheckpointJob(msgspec.Struct, frozen=True, kw_only=True):
    """A checkpoint is taken when any interval has passed (0 switches one off); the `keep` newest stay.

    `overhead`: an interval that the worker derives from what a checkpoint costs and from
    `mean_time_between_failures_s`, so that training stands still for at most that share of the time.
    `tighter_steps`: besides, for the first `TIGHTER_TIMES` times as many updates of this life, because one before it
    ended without having saved anything. `keep_best`: besides, the one with the lowest validation loss stays.
    """

    every_steps: Count = 0
    tighter_steps: Count = 0
    every_seconds: Seconds = 60.0
    overhead: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0
    mean_time_between_failures_s: Seconds = 14_400.0
    keep: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 3
    keep_best: bool = False


class DrillJob(msgspec.Struct, frozen=True, kw_only=True):
    """Fire drills: deliberate faults. Steps are optimizer updates; `generations` empty means every life.

    `leak_mib_per_step`: memory never released again, as MLX arrays or as native memory.
    `allocate_mib` at `allocate_at_step`: one sudden allocation, kept.
    `hang_kind`: "python" sleeps, "native" holds the interpreter's lock in native code.
    """

    generations: list[Positive] = []
    leak_mib_per_step: Seconds = 0.0
    leak_kind: Literal["arrays", "native"] = "arrays"
    leak_from_step: Count = 0
    allocate_mib: Count = 0
    allocate_at_step: Count | None = None
    crash_at_step: Count | None = None
    hang_at_step: Count | None = None
    hang_kind: Literal["python", "native"] = "python"
    ignore_sigterm: bool = False
    slow_start_s: Seconds = 0.0


class TaskJob(msgspec.Struct, frozen=True, kw_only=True):
    """`mlx_lm`: `config` is the YAML file. `python`: `entry` is "package.module:function", called with `args`.

    `base_dir` is the folder of the settings file: relative paths start there, and it is put on `sys.path`.
    """

    kind: Literal["mlx_lm", "python"]
    base_dir: str
    config: str | None = None
    entry: str | None = None
    args: dict[str, Any] = {}


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """All that a worker is told at its start, in `job.json` of its run's folder. Paths are absolute.

    `steps` None: the task's configuration decides. `telemetry` None: nobody listens (a bare run).
    `grace_s`: how long the worker may go on after its supervisor died, before it ends itself.
    `deterministic`: on CUDA, only kernels that give the same bits in every run.
    `stop_on_not_finite`: end with `EXIT_NOT_FINITE` at the first update whose loss is NaN or infinite.
    """

    v: Literal[1] = 1
    run: RunName
    generation: Positive
    run_dir: str
    telemetry: str | None = None
    seed: Count = 0
    steps: Positive | None = None
    task: TaskJob
    batch: BatchJob = BatchJob()
    memory: MemoryJob = MemoryJob()
    checkpoint: CheckpointJob = CheckpointJob()
    drill: DrillJob = DrillJob()
    grace_s: Seconds = 30.0
    hang_timeout_s: Seconds | None = None
    stop_on_not_finite: bool = True
    deterministic: bool = False


def load_job(data: bytes) -> Job:
    """The job in a `job.json`. Raises WireError."""
    return load_json(data, Job, JOB_LIMIT_BYTES)


def dump_json(value: msgspec.Struct) -> bytes:
    """A job or a manifest as indented JSON with a final newline."""
    return msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n"


def load_json(data: bytes, kind: type[M], limit_bytes: int) -> M:
    if len(data) > limit_bytes:
        raise WireError("oversized", f"{len(data)} bytes, the limit is {limit_bytes}")
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError as error:
        raise WireError("type", str(error)) from None
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError, ValueError) as error:
        raise WireError("malformed", str(error)) from None
