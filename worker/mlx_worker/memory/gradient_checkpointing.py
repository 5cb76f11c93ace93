"""Gradient checkpointing: a layer's activations are dropped, and computed again in the backward pass."""

from collections.abc import Callable
from typing import Any

import mlx.nn as nn

from mlx_worker.task import Task

MLX_LM_NAME = "grad_checkpoint.<locals>."
"""Start of the name of a `__call__` that mlx_lm's function installed."""
_installed: set[Callable[..., Any]] = set()


def start(task: Task, *, requested: bool) -> bool:
    """Turn it on if `requested`, unless the task has done so itself. Returns whether it is on; a note says why not.

    Call once, before the first update: `mx.compile` would keep programs compiled without it.
    """
    on = has_checkpointed_layers(task.model)
    if on or not requested:
        return on
    reason = why_not(task)
    if reason:
        task.notes.append(f"memory.gradient_checkpointing has no effect: {reason}")
    elif task.checkpoint_gradients is not None:
        task.checkpoint_gradients()
    else:
        checkpoint_layers(task.model)
    return not reason


def why_not(task: Task) -> str:
    """Why it can't be turned on; "" if it can. A task with its own `checkpoint_gradients` always can."""
    if task.checkpoint_gradients is not None:
        return ""
    layers = _layers_of(task.model)
    if not layers or not nn.Module.children(layers[0]):
        return "model.layers must be a list of modules that contain modules"
    if isinstance(task.model, type(layers[0])):
        return "the model and its layers have the same class"
    inside = [module for layer in layers for module in layer.modules()]
    if any(isinstance(module, nn.BatchNorm) for module in inside):
        return "its layers contain BatchNorm, whose running statistics would be updated twice"
    if any(_draws(module) for module in inside):
        return "its layers use dropout, which MLX would recompute with different random numbers"
    return ""


def checkpoint_layers(model: Any) -> None:
    """The same as `grad_checkpoint: true` in mlx_lm, but never twice: it replaces `__call__` of the layers' class,
    and a second time would compute everything three times."""
    from mlx_lm.tuner.trainer import grad_checkpoint  # takes a second to import

    if not has_checkpointed_layers(model):
        grad_checkpoint(model.layers[0])
        _installed.add(type(model.layers[0]).__call__)


def has_checkpointed_layers(model: Any) -> bool:
    """Whether its layers are checkpointed, by this module or by the user's own code."""
    layers = _layers_of(model)
    if not layers:
        return False
    call = type(layers[0]).__call__
    return call in _installed or getattr(call, "__qualname__", "").startswith(MLX_LM_NAME)


def _layers_of(model: Any) -> list[nn.Module]:
    layers = getattr(model, "layers", None)
    if not isinstance(layers, list | tuple) or not all(isinstance(layer, nn.Module) for layer in layers):
        return []
    return list(layers)


def _draws(module: nn.Module) -> bool:
    """Whether it draws random numbers: MLX's dropout does, and code that names `mx.random` probably does."""
    if isinstance(module, nn.Dropout | nn.Dropout2d | nn.Dropout3d):
        return bool(module._p_1 < 1)
    code = getattr(type(module).__call__, "__code__", None)
    return code is not None and "random" in code.co_names
