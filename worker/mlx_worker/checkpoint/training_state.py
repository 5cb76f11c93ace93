"""The training state in a checkpoint: capturing and restoring it."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import msgspec
from mlx.utils import tree_flatten, tree_unflatten

from mlx_supervisor import wire
from mlx_worker.checkpoint import changes, rng_state
from mlx_worker.checkpoint.manifest import MODEL, OPTIMIZER
from mlx_worker.checkpoint.store import LoadedCheckpoint
from mlx_worker.data import order
from mlx_worker.data.sources import length_of
from mlx_worker.errors import ChangedError, RefusedError
from mlx_worker.supervision.link import version_of
from mlx_worker.task import Task
from mlx_worker.words import listed

TRAINER_VERSION = 1
_LIST_SHOWN = 4


@dataclass
class Progress:
    """How far the run is, over all generations."""

    step: int = 0
    cursor: int = 0
    samples: int = 0
    tokens: int = 0
    loss: float | None = None


def trained_arrays(task: Task) -> dict[str, mx.array]:
    """The arrays that training changes, by name: trainable parameters and running statistics."""
    arrays = dict(_flat(task.model.trainable_parameters()))
    for path, module in task.model.named_modules():
        if isinstance(module, nn.BatchNorm) and "running_mean" in module:
            prefix = f"{path}." if path else ""
            arrays |= {f"{prefix}{name}": module[name] for name in ("running_mean", "running_var")}
    return arrays


def optimizer_arrays(task: Task) -> dict[str, mx.array]:
    """The optimizer's state by name; its `step` drives the learning rate's schedule."""
    return {name: value for name, value in _flat(task.optimizer.state) if isinstance(value, mx.array)}


def recipe(job: wire.Job, task: Task, steps: int, size: int, effective: int) -> dict[str, Any]:
    """The facts that define the run, ready for JSON. See `Task.fixed`, `Task.free` and `order`."""
    fixed = {
        "seed": job.seed,
        "task.kind": job.task.kind,
        "optimizer": type(task.optimizer).__name__,
        "dataset": {"samples": length_of(task.dataset), "fingerprint": task.fingerprint},
        **task.fixed,
    }
    free = {
        "steps": steps,
        "batch.requested": {"size": job.batch.requested_size, "effective": job.batch.requested_effective},
        "batch.size": size,
        "batch.effective": effective,
        "batch.preserve_effective": job.batch.preserve_effective,
        "learning_rate": learning_rates(task),
        "checkpoint": _chosen(job.checkpoint),
        "max_grad_norm": task.max_grad_norm,
        "memory": msgspec.to_builtins(job.memory),
        "deterministic": job.deterministic,
        "stop_on_not_finite": job.stop_on_not_finite,
        **task.free,
    }
    facts = {"fixed": fixed, "free": free, "order": order.decide(task, effective)}
    plain: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(facts, enc_hook=str))
    return plain


def _chosen(checkpoint: wire.CheckpointJob) -> dict[str, Any]:
    """The settings without the value that the supervisor measures."""
    chosen: dict[str, Any] = msgspec.to_builtins(checkpoint)
    del chosen["mean_time_between_failures_s"]
    return chosen


def learning_rates(task: Task) -> dict[str, Any]:
    """Every initial learning rate of the optimizer, and whether it follows a schedule."""
    rates = {name: value for name, value in optimizer_arrays(task).items() if name.endswith("learning_rate")}
    scheduled = bool(getattr(task.optimizer, "_schedulers", None))
    return {name: {"initial": _number(value), "scheduled": scheduled} for name, value in rates.items()}


def trainer_state(progress: Progress, epoch: int, facts: dict[str, Any], task: Task) -> dict[str, Any]:
    """The content of `trainer.json`."""
    return {
        "v": TRAINER_VERSION,
        "progress": asdict(progress),
        "epoch": epoch,
        "rng": rng_state.capture(),
        "schedule_step": _schedule_step(task),
        "recipe": facts,
        "versions": {name: version_of(name) for name in ("mlx", "mlx-lm", "numpy")},
    }


def restore(
    checkpoint: LoadedCheckpoint, task: Task, facts: dict[str, Any], job: wire.Job
) -> tuple[Progress, list[str]]:
    """Restore the checkpoint into the task and the random generators; returns the progress, and notes on changes.

    `facts["order"]` becomes the checkpoint's. Raises RefusedError if the job does not fit the checkpoint.
    """
    trainer = checkpoint.trainer
    if trainer.get("v") != TRAINER_VERSION:
        found = trainer.get("v")
        raise RefusedError(f"{checkpoint.path}: trainer.json: expected version {TRAINER_VERSION}, found {found!r}")
    try:
        old, progress = trainer["recipe"], Progress(**trainer["progress"])
        notes = changes.compare(old, facts, progress.step) + changes.tighter(job.checkpoint, old)
        facts["order"] = order.keep(old.get("order"), facts["order"], str(checkpoint.path))
        _restore_weights(checkpoint, task)
        changed_rates = old["free"]["learning_rate"] != facts["free"]["learning_rate"]
        _restore_optimizer(checkpoint, task, keep_rates=changed_rates)
        rng_state.restore(trainer["rng"])
    except (KeyError, TypeError, ValueError) as error:
        text = f"{type(error).__name__}: {error}"
        raise RefusedError(f"{checkpoint.path}: trainer.json is invalid: {text}") from error
    if progress.step != checkpoint.step:
        raise RefusedError(f"{checkpoint.path}: trainer.json is for step {progress.step}, not {checkpoint.step}")
    return progress, notes


def require_same_arrays(task: Task, path: Path) -> None:
    """Compare names, types and shapes of the arrays in the checkpoint at `path`; reads only the files' headers.

    Raises RefusedError as `restore` does, and errors of MLX for files that it can't read.
    """
    for what, have, name in (
        ("trained arrays", trained_arrays(task), MODEL),
        ("optimizer state", optimizer_arrays(task), OPTIMIZER),
    ):
        saved: Any = mx.load(str(path / name))  # lazy: the arrays are read when evaluated
        _require_same(what, have, saved, path)


def _restore_weights(checkpoint: LoadedCheckpoint, task: Task) -> None:
    _require_same("trained arrays", trained_arrays(task), checkpoint.trained, checkpoint.path)
    task.model.update(tree_unflatten(list(checkpoint.trained.items())))
    mx.eval(task.model.state)


def _restore_optimizer(checkpoint: LoadedCheckpoint, task: Task, *, keep_rates: bool) -> None:
    _require_same("optimizer state", optimizer_arrays(task), checkpoint.optimizer, checkpoint.path)
    saved = {
        name: value
        for name, value in checkpoint.optimizer.items()
        if not (keep_rates and name.endswith("learning_rate"))
    }
    _assign(task.optimizer.state, "", saved)  # in place: compiled functions refer to these dictionaries
    mx.eval(task.optimizer.state)


def _assign(tree: Any, prefix: str, saved: dict[str, mx.array]) -> None:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in list(items):
        name = f"{prefix}{key}"
        if isinstance(value, dict | list):
            _assign(value, f"{name}.", saved)
        elif name in saved:
            tree[key] = saved[name]


def _require_same(what: str, have: dict[str, mx.array], saved: dict[str, mx.array], path: Path) -> None:
    new, old = _shapes(have), _shapes(saved)
    if new == old:
        return
    names = sorted(name for name in {*new, *old} if new.get(name) != old.get(name))
    parts = [f"{name}: {old.get(name, 'absent')} → {new.get(name, 'absent')}" for name in names]
    text = f"the task's {what} differ from the checkpoint's ({path}): {listed(parts, _LIST_SHOWN, '; ')}"
    raise ChangedError(f"{text}. Undo the change, or begin anew with --fresh.")


def _shapes(arrays: dict[str, mx.array]) -> dict[str, str]:
    return {name: f"{str(array.dtype).rpartition('.')[2]}{list(array.shape)}" for name, array in arrays.items()}


def _flat(tree: Any) -> list[tuple[str, Any]]:
    pairs: Any = tree_flatten(tree)
    return list(pairs)


def _number(value: mx.array) -> float:
    number: Any = value.item()
    return float(number)


def _schedule_step(task: Task) -> int:
    steps = [int(_number(value)) for name, value in optimizer_arrays(task).items() if name.rpartition(".")[2] == "step"]
    return max(steps, default=0)
