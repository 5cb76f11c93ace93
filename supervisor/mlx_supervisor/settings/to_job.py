"""From a run's settings to the job that its worker is given."""

from pathlib import Path

import msgspec

from mlx_supervisor import wire
from mlx_supervisor.settings.paths import resolve
from mlx_supervisor.settings.schema import CheckpointSettings, MemorySettings, Settings
from mlx_supervisor.settings.sizes import parse_bytes as parse_bytes
from mlx_supervisor.settings.sizes import share_of


def job_of(
    settings: Settings,
    name: str,
    generation: int,
    run_dir: Path,
    telemetry: str | None,
    batch_size: int | None,
    effective_batch: int | None,
    checkpoint_every_steps: int | None = None,
    mean_time_between_failures_s: float | None = None,
    memory_limit_bytes: int | None = None,
    gradient_checkpointing: bool = False,
) -> wire.Job:
    """What the worker of one generation is told. `checkpoint_every_steps` tightens the settings' interval only."""
    run = settings.runs[name]
    base = settings.path.parent
    config = resolve(run.task.config, base) if run.task.config is not None else None
    return wire.Job(
        run=name,
        generation=generation,
        run_dir=str(run_dir.absolute()),
        telemetry=telemetry,
        seed=run.seed,
        steps=run.steps,
        task=wire.TaskJob(
            kind=run.task.kind,
            base_dir=str(base),
            config=None if config is None else str(config),
            entry=run.task.entry,
            args=run.task.args,
        ),
        batch=wire.BatchJob(
            size=batch_size,
            effective=effective_batch,
            preserve_effective=run.batch.preserve_effective,
            sample_log=run.batch.sample_log,
        ),
        memory=_memory_job(run.memory, memory_limit_bytes, gradient_checkpointing),
        checkpoint=_checkpoint_job(run.checkpoint, checkpoint_every_steps, mean_time_between_failures_s),
        drill=wire.DrillJob(**msgspec.structs.asdict(run.drill)),
        grace_s=run.restart.stop_grace_s,
        hang_timeout_s=run.restart.hang_timeout_s,
        stop_on_not_finite=run.stop_on_not_finite,
        deterministic=run.deterministic,
    )


def _checkpoint_job(
    settings: CheckpointSettings, tighter_steps: int | None, mean_time_between_failures_s: float | None
) -> wire.CheckpointJob:
    job = wire.CheckpointJob(
        every_steps=settings.every_steps or 0,
        tighter_steps=tighter_steps or 0,
        every_seconds=settings.every_seconds or 0.0,
        overhead=settings.overhead if settings.automatic else 0.0,
        keep=settings.keep,
        keep_best=settings.keep_best,
    )
    if mean_time_between_failures_s is None:
        return job
    return msgspec.structs.replace(job, mean_time_between_failures_s=mean_time_between_failures_s)


def _memory_job(settings: MemorySettings, limit_bytes: int | None, gradient_checkpointing: bool) -> wire.MemoryJob:
    plain = ("policy", "clear_before_gradients", "clear_after_gradients", "clear_after_update", "release_pause_s")
    job = wire.MemoryJob(
        limit_bytes=limit_bytes,
        gradient_checkpointing=gradient_checkpointing,
        **{name: getattr(settings, name) for name in plain},
    )
    if settings.cache_limit is not None:
        job = msgspec.structs.replace(job, cache_limit_bytes=parse_bytes(settings.cache_limit, None))
    share = share_of(settings.device_limit)  # of what, only the worker knows: it has the device
    if share is not None:
        return msgspec.structs.replace(job, device_limit_share=share)
    return msgspec.structs.replace(job, device_limit_bytes=parse_bytes(settings.device_limit, None))
