"""The worker's job, in `job.json` of its run's folder. The settings hold the defaults; only `DrillJob` is in both."""

from typing import Annotated, Any, Literal, TypeVar

import msgspec

from mlx_supervisor.wire.fields import Count, Positive, RunName, Seconds, WireError

JOB_LIMIT_BYTES = 1024 * 1024

M = TypeVar("M")


class BatchJob(msgspec.Struct, frozen=True, kw_only=True):
    """`size`: the micro-batch; `effective`: the effective batch. None: the task's configuration decides.

    `requested_size`, `requested_effective`: what the settings, or (`from_task`) the task in an earlier generation,
    requested; the batch in use may be smaller after a trip. None: not known yet.
    `sample_log`: append the ids of every update's samples to `samples.jsonl` in the run's folder.
    """

    size: Positive | None
    effective: Positive | None
    preserve_effective: bool
    sample_log: bool
    requested_size: Positive | None = None
    requested_effective: Positive | None = None
    from_task: bool = False


class MemoryJob(msgspec.Struct, frozen=True, kw_only=True):
    """The treatment of MLX's cache, and the limits.

    `policy` "adaptive": the cache may hold what the limits leave over the measured need. "always": it is cleared at the
    points that the `clear_…` fields switch on, each time followed by `release_pause_s` of sleep. "never": only MLX's
    own limits apply. `limit_bytes`: for the worker's process group; None: no limit.
    `device_limit_bytes`, or else `device_limit_share` of the device's memory: for a device with its own memory.
    `gradient_checkpointing`: recompute activations in the backward pass instead of keeping them.
    """

    policy: Literal["adaptive", "always", "never"]
    clear_before_gradients: bool
    clear_after_gradients: bool
    clear_after_update: bool
    release_pause_s: Seconds
    cache_limit_bytes: Count | None
    limit_bytes: Count | None
    device_limit_bytes: Count | None
    device_limit_share: Annotated[float, msgspec.Meta(gt=0, le=1)]
    gradient_checkpointing: bool


class CheckpointJob(msgspec.Struct, frozen=True, kw_only=True):
    """A checkpoint is taken when any interval has passed (0 switches one off); the newest `keep` are kept.

    `overhead`: the largest share of the time for which checkpoints may stall training; the worker derives an interval
    from it, from a checkpoint's cost and from `mean_time_between_failures_s`. `tighter_steps`: an additional interval
    during the first `TIGHTER_TIMES` times as many updates, after a generation that saved nothing.
    `keep_best`: also keep the checkpoint with the lowest validation loss.
    """

    every_steps: Count
    tighter_steps: Count
    every_seconds: Seconds
    overhead: Annotated[float, msgspec.Meta(ge=0, le=1)]
    mean_time_between_failures_s: Seconds
    keep: Annotated[int, msgspec.Meta(ge=1, le=1000)]
    keep_best: bool


class DrillJob(msgspec.Struct, frozen=True, kw_only=True):
    """Fire drills: deliberate faults; also the table `drill` of the settings. Steps are optimizer updates.

    `generations`: those with the drill; empty: all. `leak_mib_per_step`: memory that is never released, as MLX arrays
    or as native memory. `allocate_mib` at `allocate_at_step`: one sudden allocation that is kept.
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

    `base_dir`: the folder where relative paths start, in general the settings file's; for kind `python` it is put on
    `sys.path`.
    `mlx_lm_compatible`: average micro-batches as mlx_lm does, without weights.
    `options`: keys of mlx_lm.lora that override the YAML file's, or replace the file. `options_from`: where each was
    set, as an error names it: `--iters`, or the settings file and the key.
    """

    kind: Literal["mlx_lm", "python"]
    base_dir: str
    config: str | None
    entry: str | None
    args: dict[str, Any]
    options: dict[str, Any] = {}
    options_from: dict[str, str] = {}
    mlx_lm_compatible: bool = False


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """The content of `job.json`. Paths are absolute.

    `steps` None: the task's configuration decides. `seed_from_task`: so does the seed, and `seed` is 0; for kind
    `mlx_lm` only. `settings_file`: with `run` it identifies the run. `telemetry` None: a bare run, which reports to the
    terminal.
    `results_of`: the run's folder in its state folder, also where `run_dir` is a temporary one; BARE for a bare run.
    `fresh`: identifies the `--fresh` that began the run; it may replace the results of former runs.
    `grace_s`: the grace period in which the worker ends itself after its supervisor died.
    `deterministic`: on CUDA, use only kernels that give the same bits in every run.
    `max_grad_norm`, `ema_decay`: replace the task's own values; 0 switches them off, None leaves them.
    `stop_on_not_finite`: exit with `EXIT_NOT_FINITE` at the first update whose loss is NaN or infinite.
    """

    v: Literal[1] = 1
    run: RunName
    generation: Positive
    run_dir: str
    telemetry: str | None
    seed: Count
    seed_from_task: bool = False
    settings_file: str = ""
    results_of: str = ""
    fresh: str = ""
    steps: Positive | None
    task: TaskJob
    batch: BatchJob
    memory: MemoryJob
    checkpoint: CheckpointJob
    drill: DrillJob
    grace_s: Seconds
    hang_timeout_s: Seconds | None
    stop_on_not_finite: bool
    deterministic: bool
    max_grad_norm: Annotated[float, msgspec.Meta(ge=0)] | None = None
    ema_decay: Annotated[float, msgspec.Meta(ge=0, lt=1)] | None = None


def load_job(data: bytes) -> Job:
    """The job in a `job.json`. Raises WireError."""
    return load_json(data, Job, JOB_LIMIT_BYTES)


def dump_json(value: msgspec.Struct) -> bytes:
    """A job or a manifest as indented JSON with a final newline."""
    return msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n"


def load_json(data: bytes, kind: type[M], limit_bytes: int) -> M:
    """A JSON file's content as a `kind`. Raises WireError."""
    if len(data) > limit_bytes:
        raise WireError("oversized", f"{len(data):,} bytes; allowed: at most {limit_bytes:,}")
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError as error:
        raise WireError("type", str(error)) from None
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError, ValueError) as error:
        raise WireError("malformed", str(error)) from None
