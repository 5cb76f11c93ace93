"""Gradient checkpointing: what a layer computed is dropped, and computed again in the backward pass."""

from collections.abc import Callable
from typing import Any

import mlx.nn as nn

from mlx_worker.task import Task

_MLX_LM_NAME = "grad_checkpoint.<locals>."
"""How the name of a `__call__` begins that mlx_lm's function has put in place."""
_ours: set[Callable[..., Any]] = set()


def start(task: Task, *, asked: bool) -> bool:
    """Turn it on if `asked`, unless the task has done so itself. Whether it is on; if it can't be, a note says why.

    To be called once, before the first update: `mx.compile` would keep the programs made without it.
    """
    on = has_checkpointed_layers(task.model)
    if on or not asked:
        return on
    reason = why_not(task)
    if reason:
        task.notes.append(f"memory.gradient_checkpointing has no effect here: {reason}")
    elif task.checkpoint_gradients is not None:
        task.checkpoint_gradients()
    else:
        checkpoint_layers(task.model)
    return not reason


def why_not(task: Task) -> str:
    """What keeps it from being turned on; empty when nothing does. A task that says itself how can always."""
    if task.checkpoint_gradients is not None:
        return ""
    layers = _layers_of(task.model)
    if not layers or not nn.Module.children(layers[0]):
        return "the model has no list `layers` of modules that are made of modules"
    if isinstance(task.model, type(layers[0])):
        return "the class of the model's layers is that of the model"
    inside = [module for layer in layers for module in layer.modules()]
    if any(isinstance(module, nn.BatchNorm) for module in inside):
        return "its layers keep running statistics, which would be updated twice"
    if any(_draws(module) for module in inside):
        return "its layers use dropout, and MLX would compute them again with other random numbers"
    return ""


def checkpoint_layers(model: Any) -> None:
    """Exactly what `grad_checkpoint: true` does in mlx_lm, but never twice: it replaces the layers' class's `__call__`,
    and a second time would compute everything three times."""
    from mlx_lm.tuner.trainer import grad_checkpoint  # takes a second to import

    if not has_checkpointed_layers(model):
        grad_checkpoint(model.layers[0])
        _ours.add(type(model.layers[0]).__call__)


def has_checkpointed_layers(model: Any) -> bool:
    """Whether that has been done, here or by the user's own code."""
    layers = _layers_of(model)
    if not layers:
        return False
    call = type(layers[0]).__call__
    return call in _ours or getattr(call, "__qualname__", "").startswith(_MLX_LM_NAME)


def _layers_of(model: Any) -> list[nn.Module]:
    layers = getattr(model, "layers", None)
    if not isinstance(layers, list | tuple) or not all(isinstance(layer, nn.Module) for layer in layers):
        return []
    return list(layers)


def _draws(module: nn.Module) -> bool:
    """Whether it draws random numbers: MLX's dropout does, and other code that speaks of `mx.random` most likely."""
    if isinstance(module, nn.Dropout | nn.Dropout2d | nn.Dropout3d):
        return bool(module._p_1 < 1)
    code = getattr(type(module).__call__, "__code__", None)
    return code is not None and "random" in code.co_names
