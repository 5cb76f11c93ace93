"""User-defined tasks: `entry = "package.module:function"`."""

import importlib
import inspect
import math
import sys
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten

from mlx_supervisor import wire
from mlx_worker.data import sources
from mlx_worker.errors import RefusedError
from mlx_worker.task import Task
from mlx_worker.tasks import fingerprint
from mlx_worker.tasks.find_entry import check_entry
from mlx_worker.tasks.mistakes import MISTAKES, described
from mlx_worker.tasks.settings_key import settings_key
from mlx_worker.tasks.suggest import did_you_mean

SIGNATURE_SHOWN = 200
"""Characters."""


def build(job: wire.Job) -> Task:
    """Import the entry, call it, check its result. Raises RefusedError; errors of the user's code pass through."""
    entry = job.task.entry or ""
    key = settings_key(job, "task.entry")
    function = _find(job, key)
    arguments = _arguments(function, job)
    task = function(**arguments)
    if not isinstance(task, Task):
        raise RefusedError(f"{key}: {entry} must return an mlx_worker.task.Task, found {type(task).__name__}")
    check(task, f"{key}: {entry}")
    task.fixed = {"entry": entry, **task.fixed}
    task.free = {
        "task.args": job.task.args,
        "optimizer_config": _options(task.optimizer),
        "frozen_weights": fingerprint.of_arrays(_frozen(task.model)),
        **task.free,
    }
    return task


def _options(optimizer: Any) -> dict[str, Any]:
    """The optimizer's constants, such as betas and weight_decay. Its learning rate is a fact of its own."""
    public = {name: value for name, value in vars(optimizer).items() if not name.startswith("_")}
    return {name: value for name, value in public.items() if _is_plain(value)}


def _is_plain(value: Any) -> bool:
    return (
        all(map(_is_plain, value)) if isinstance(value, list | tuple) else isinstance(value, bool | int | float | str)
    )


def _frozen(model: Any) -> dict[str, mx.array]:
    """The parameters that training doesn't change: neither trainable nor running statistics."""
    trained: Any = tree_flatten(model.trainable_parameters())
    everything: Any = tree_flatten(model.parameters())
    names = {name for name, _ in trained}
    statistics = ("running_mean", "running_var")
    return {
        name: value for name, value in everything if name not in names and name.rpartition(".")[2] not in statistics
    }


def _find(job: wire.Job, key: str) -> Callable[..., Any]:
    check_entry(job)
    entry, base_dir = job.task.entry or "", job.task.base_dir
    module_name, _, path = entry.partition(":")
    # First, as Python does for a script; this process's own modules are already imported.
    sys.path.insert(0, base_dir)
    try:
        found: Any = importlib.import_module(module_name)
    except MISTAKES as error:
        raise RefusedError(f"{key}: cannot import {module_name} from {base_dir}: {described(error)}") from error
    for name in path.split("."):
        if not hasattr(found, name):
            functions = [each for each in dir(found) if not each.startswith("_") and callable(getattr(found, each))]
            near = did_you_mean(name, functions)
            raise RefusedError(f"{key}: {module_name} ({_file_of(module_name)}) has no {path!r:.200}{near}")
        found = getattr(found, name)
    if not callable(found):
        raise RefusedError(f"{key}: {entry} must be a function that returns a Task, found {type(found).__name__}")
    function: Callable[..., Any] = found
    return function


def _file_of(module_name: str) -> str:
    return str(getattr(sys.modules[module_name], "__file__", None) or "no file")


def _arguments(function: Callable[..., Any], job: wire.Job) -> dict[str, Any]:
    arguments = dict(job.task.args)
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return arguments
    if "seed" in signature.parameters:
        arguments.setdefault("seed", job.seed)
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise RefusedError(
            f"{settings_key(job, 'task.args')}: do not fit {job.task.entry}{signature!s:.{SIGNATURE_SHOWN}}: {error}"
        ) from None
    return arguments


def check(task: Task, where: str) -> None:
    def require(valid: bool, name: str, allowed: str) -> None:
        if not valid:
            found = type(getattr(task, name)).__name__
            raise RefusedError(f"{where}: Task.{name} must be {allowed}, found {found}")

    require(isinstance(task.model, nn.Module), "model", "an mlx.nn.Module")
    require(isinstance(task.optimizer, optim.Optimizer), "optimizer", "an mlx.optimizers.Optimizer")
    require(callable(task.loss), "loss", "a function")
    require(callable(task.collate), "collate", "a function")
    require(task.evaluate is None or callable(task.evaluate), "evaluate", "a function")
    require(task.export is None or callable(task.export), "export", "a function")
    own = task.checkpoint_gradients
    require(own is None or callable(own), "checkpoint_gradients", "a function")
    require(sources.is_usable(task.dataset), "dataset", sources.ALLOWED)
    for name in ("state", "load_state", "after_update", "report_update"):
        require(getattr(task, name) is None or callable(getattr(task, name)), name, "a function")
    _check_values(task, where)


def _check_values(task: Task, where: str) -> None:
    if task.lengths is not None and not sources.is_sized(task.dataset):
        raise RefusedError(f"{where}: Task.lengths needs a Task.dataset with len() and [index]")
    if (task.state is None) != (task.load_state is None):
        missing = "state" if task.state is None else "load_state"
        raise RefusedError(f"{where}: Task.{missing} is missing: set both state and load_state, or neither")
    for name, limit, allowed in (
        ("max_grad_norm", math.inf, "a number above 0, or None"),
        ("ema_decay", 1.0, "a number above 0 and below 1, or None"),
    ):
        value = getattr(task, name)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (number and 0 < value < limit):
            raise RefusedError(f"{where}: Task.{name} must be {allowed}, found {value!r:.80}")
