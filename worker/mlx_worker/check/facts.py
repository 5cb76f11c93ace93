"""What a run would train, read without training: model, data, batch, output folder, sizes."""

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from msgspec import structs

from mlx_supervisor import wire
from mlx_supervisor.wire.check import CheckReport, SubsetReport
from mlx_worker.check import resume
from mlx_worker.check.longest import STREAM_READ, longest
from mlx_worker.checkpoint import snapshot
from mlx_worker.data.sources import head_of, is_sized
from mlx_worker.memory import gradient_checkpointing
from mlx_worker.memory.cache_policy import CachePolicy
from mlx_worker.task import Task
from mlx_worker.tasks.mlx_lm.inputs import LoraInputs
from mlx_worker.tasks.output_claim import check_output
from mlx_worker.training import loop
from mlx_worker.training.finishing import unwritable

COUNT_AT_MOST = 200_000
"""Tokens of a larger set are not counted: every sample would have to be read."""

ADAPTER_NAMES = {"lora_a", "lora_b", "m"}
"""As mlx_lm's LoRA and DoRA layers name their own arrays."""


def examine(job: wire.Job, inputs: LoraInputs | None, checkpoints: Path | None) -> CheckReport:
    """Load the task as a run does, and describe it. `checkpoints`: the folder of the run's own.

    Raises RefusedError and the errors of the user's code.
    """
    memory = CachePolicy(job.memory)
    job, task, plan = prepared = loop.prepare(job, inputs, connects=False)
    found = resume.Resume() if checkpoints is None else resume.read(checkpoints, prepared)
    mx.eval(task.optimizer.state)
    if stream := not is_sized(task.dataset):
        task = replace(task, dataset=head_of(task.dataset, STREAM_READ))
    trainable = sum(int(array.size) for array in dict(tree_flatten(task.model.trainable_parameters())).values())
    averaged_bytes = 0 if task.ema_decay is None else trainable * mx.float32.size
    counters = memory.read()
    held_bytes = counters.process_bytes or counters.resident_bytes  # as the supervisor charges it
    recomputes = gradient_checkpointing.start(task, requested=job.memory.gradient_checkpointing)
    problems = [] if task.export is None or task.export_dir is None else _unusable(task.export_dir, job)
    return CheckReport(
        problems=[*problems, *found.refused],
        notes=[*found.applied, *task.notes],
        resumes_at=found.step,
        model=str(task.fixed.get("model", "")),
        architecture=_architecture(task.model),
        parameters=_parameters(task.model),
        adapters=_adapters(task.model) if job.task.kind == "mlx_lm" else 0,
        trainable=trainable,
        optimizer=type(task.optimizer).__name__,
        data=[
            structs.replace(_counted("train", task.dataset), stream=stream),
            *(_counted(name, part) for name, part in task.other_datasets.items()),
        ],
        shapes=_shapes(task, plan.size),
        batch_size=plan.size,
        effective_batch=plan.effective,
        steps=plan.steps,
        evaluate_every_steps=task.evaluate_every_steps if task.evaluate is not None else 0,
        output=None if task.export_dir is None else str(task.export_dir),
        output_bytes=0 if task.export is None else task.export_bytes,
        checkpoint_bytes=snapshot.size_bytes(task) + averaged_bytes,
        held_bytes=held_bytes,
        gradient_checkpointing=recomputes,
        device=str(mx.default_device().type).removeprefix("DeviceType."),
        device_limit_bytes=memory.device.limit_bytes(job.memory),
    )


def _architecture(model: Any) -> str:
    name = getattr(getattr(model, "args", None), "model_type", None)
    return str(name) if isinstance(name, str) else type(model).__name__


def _parameters(model: Any) -> int:
    """Weights; a quantized layer's packed ones count one by one."""
    total = 0
    for _, module in model.named_modules():
        bits = getattr(module, "bits", None)
        for name, value in module.items():
            if isinstance(value, mx.array) and not name.startswith("_"):
                packed = isinstance(bits, int) and name == "weight" and value.dtype == mx.uint32
                skipped = isinstance(bits, int) and name in ("scales", "biases")
                total += 0 if skipped else int(value.size) * (32 // bits if packed and bits else 1)
    return total


def _adapters(model: Any) -> int:
    """Weights that mlx_lm adds to the base model's."""
    named = dict(tree_flatten(model.trainable_parameters()))
    return sum(int(array.size) for name, array in named.items() if name.rpartition(".")[2] in ADAPTER_NAMES)


def _counted(name: str, samples: Any) -> SubsetReport:
    """Tokens are counted where samples are token sequences, or tuples that begin with one."""
    total = len(samples)
    if hasattr(samples, "count") and hasattr(samples, "sizes"):  # an mlx_lm data set
        found = samples.count(everything=True)
        return SubsetReport(
            name=name, samples=total, tokens=found.tokens, longest=found.longest,
            truncated=found.truncated, cut_tokens=found.tokens_cut, empty=found.empty, masked=found.masked,
        )  # fmt: skip
    counted = min(total, COUNT_AT_MOST)
    if counted == 0 or counted < total or not _is_tokens(_tokens_of(samples[0])):
        return SubsetReport(name=name, samples=total)
    lengths = [len(_tokens_of(samples[index])) for index in range(counted)]
    return SubsetReport(name=name, samples=total, tokens=sum(lengths), longest=max(lengths))


def _tokens_of(sample: Any) -> Any:
    return sample[0] if isinstance(sample, tuple) and sample else sample


def _is_tokens(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and isinstance(value[0], int)
    return getattr(value, "ndim", None) == 1 and "int" in str(getattr(value, "dtype", ""))


def _shapes(task: Task, size: int) -> list[str]:
    """Of the arrays that the loss gets for the longest samples."""
    arrays = loop.collate(task, longest(task, size))
    return [f"{array.dtype} {list(array.shape)}".removeprefix("mlx.core.") for array in arrays]


def _unusable(folder: Path, job: wire.Job) -> list[str]:
    """Why the output folder can't be used. It is made and written to, and left as it was."""
    if taken := check_output(folder, job):
        return [f"output folder: {taken}"]
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    problem = unwritable(folder)
    for each in missing:
        with contextlib.suppress(OSError):
            each.rmdir()
    return [f"output folder: {problem}"] if problem else []
