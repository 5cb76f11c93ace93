"""A run's settings as the job of one worker."""

from dataclasses import dataclass
from pathlib import Path

from mlx_supervisor import wire
from mlx_supervisor.core.actions import Spawn
from mlx_supervisor.core.history import DEFAULT_MTBF_S
from mlx_supervisor.settings.configuration import option
from mlx_supervisor.settings.paths import resolve
from mlx_supervisor.settings.schema import BatchSettings, CheckpointSettings, MemorySettings, RunSettings, Settings
from mlx_supervisor.settings.validation import join
from mlx_supervisor.wire.owner import BARE


@dataclass(frozen=True)
class Past:
    """What a run's earlier generations leave to the next. `requested_…`: the batch that the task requested."""

    requested_size: int | None = None
    requested_effective: int | None = None


def first_spawn(run: RunSettings) -> Spawn:
    """A first generation as the settings request it, without a supervisor that starts smaller or adapts it."""
    recomputes = run.memory.gradient_checkpointing == "always"
    return Spawn(1, run.batch.size, run.batch.effective, gradient_checkpointing=recomputes)


def job_of(
    settings: Settings,
    name: str,
    run_dir: Path,
    telemetry: str | None,
    spawn: Spawn,
    memory_limit_bytes: int | None,
    past: Past | None = None,
) -> wire.Job:
    """The job of the generation that `spawn` starts. `telemetry`: the address for reports; None: a bare run."""
    run, past = settings.runs[name], past or Past()
    return wire.Job(
        run=name,
        generation=spawn.generation,
        run_dir=str(run_dir.absolute()),
        telemetry=telemetry,
        seed=run.seed or 0,
        settings_file=str(settings.path.resolve()),
        results_of=BARE if settings.bare else str(settings.run_dir(name).resolve()),
        fresh=settings.fresh,
        seed_from_task=run.seed is None and run.task.kind == "mlx_lm",
        steps=run.steps,
        task=_task_job(settings, name),
        batch=_batch_job(run.batch, spawn, past),
        memory=_memory_job(run.memory, memory_limit_bytes, spawn.gradient_checkpointing),
        checkpoint=_checkpoint_job(run.checkpoint, spawn),
        drill=run.drill,
        grace_s=run.restart.stop_grace_s,
        hang_timeout_s=run.restart.hang_timeout_s,
        stop_on_not_finite=run.stop_on_not_finite,
        deterministic=run.deterministic,
        max_grad_norm=run.max_grad_norm,
        ema_decay=run.ema_decay,
    )


def _batch_job(settings: BatchSettings, spawn: Spawn, past: Past) -> wire.BatchJob:
    size, effective = past.requested_size, past.requested_effective
    if settings.size is not None:
        size, effective = settings.size, settings.effective
    return wire.BatchJob(
        size=spawn.batch_size,
        effective=spawn.effective_batch,
        preserve_effective=settings.preserve_effective,
        sample_log=settings.sample_log,
        requested_size=size,
        requested_effective=effective,
        from_task=settings.size is None,
    )


def _task_job(settings: Settings, name: str) -> wire.TaskJob:
    task, base = settings.runs[name].task, settings.base_dir
    config = None if task.config is None else resolve(task.config, base)
    file = f"{settings.path}: {join('runs', name)}.task.options"
    return wire.TaskJob(
        kind=task.kind,
        base_dir=str(base),
        config=None if config is None else str(config),
        entry=task.entry,
        args=task.args,
        options=task.options,
        mlx_lm_compatible=task.mlx_lm_compatible,
        options_from={key: option(key) if key in settings.typed else f"{file}.{key}" for key in task.options},
    )


def _checkpoint_job(settings: CheckpointSettings, spawn: Spawn) -> wire.CheckpointJob:
    between_s = spawn.mean_time_between_failures_s
    return wire.CheckpointJob(
        every_steps=settings.every_steps or 0,
        tighter_steps=spawn.checkpoint_every_steps or 0,
        every_seconds=settings.every_seconds or 0.0,
        overhead=settings.overhead if settings.automatic else 0.0,
        mean_time_between_failures_s=DEFAULT_MTBF_S if between_s is None else between_s,
        keep=settings.keep,
        keep_best=settings.keep_best,
    )


def _memory_job(settings: MemorySettings, limit_bytes: int | None, gradient_checkpointing: bool) -> wire.MemoryJob:
    device = settings.device_limit  # only the worker knows the device's memory: a share stays a share
    return wire.MemoryJob(
        policy=settings.policy,
        clear_before_gradients=settings.clear_before_gradients,
        clear_after_gradients=settings.clear_after_gradients,
        clear_after_update=settings.clear_after_update,
        release_pause_s=settings.release_pause_s,
        cache_limit_bytes=settings.cache_limit,
        limit_bytes=limit_bytes,
        device_limit_bytes=None if isinstance(device, float) else device,
        device_limit_share=device if isinstance(device, float) else 1.0,
        gradient_checkpointing=gradient_checkpointing,
    )
