"""A task's own figures beside the loss: checked, then reported as numbers."""

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

import mlx.core as mx

from mlx_supervisor import wire
from mlx_worker.errors import RefusedError

GRAD_NORM = "grad_norm"
"""The metric that clipping adds: the global norm before clipping."""


def arrays_of(found: Any, where: str, *, added: int = 0) -> dict[str, mx.array]:
    """The metrics as float32 scalars. `where`: "Task.loss". `added`: metrics that the loop itself adds.

    Raises RefusedError for a wrong type, name, shape or number of metrics.
    """
    _check_names(found, where, added)
    metrics: dict[str, mx.array] = {}
    for name, value in found.items():
        if not isinstance(value, mx.array | Real) or (isinstance(value, mx.array) and value.size != 1):
            shown = f"an array of shape {tuple(value.shape)}" if isinstance(value, mx.array) else type(value).__name__
            raise RefusedError(f"{where}: metric {name!r} must be a number or a scalar mx.array, found {shown}")
        array = value if isinstance(value, mx.array) else mx.array(float(value))
        metrics[name] = array.astype(mx.float32).squeeze()
    return metrics


def numbers_of(metrics: Mapping[str, mx.array]) -> dict[str, float | None]:
    """The evaluated metrics; None for NaN and infinity."""
    values = {name: float(_item(value)) for name, value in metrics.items()}
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def loss_and_metrics(found: Any, where: str) -> tuple[float, dict[str, float | None]]:
    """What an evaluation returned: a number, or (number, metrics). Raises RefusedError."""
    pair = found if isinstance(found, tuple | list) else (found, {})
    if len(pair) != 2 or not isinstance(pair[1], Mapping):
        raise RefusedError(f"{where} must return a number, or (number, dict of metrics); found {type(found).__name__}")
    try:
        loss = float(pair[0])
    except (TypeError, ValueError) as error:
        raise RefusedError(
            f"{where} must return a number, or (number, dict of metrics); found {type(pair[0]).__name__}"
        ) from error
    return loss, numbers_of(arrays_of(pair[1], where))


def text_of(metrics: Mapping[str, float | None]) -> str:
    """`, accuracy 0.9123` for each; "nan" for a value that is not finite."""
    return "".join(f", {name} {'nan' if value is None else f'{value:.4g}'}" for name, value in metrics.items())


def _check_names(found: Any, where: str, added: int) -> None:
    if not isinstance(found, Mapping):
        raise RefusedError(f"{where}: metrics must be a dict from names to numbers, found {type(found).__name__}")
    limit = wire.METRICS_LIMIT - added
    if len(found) > limit:
        besides = f" besides {GRAD_NORM}" if added else ""
        raise RefusedError(f"{where}: found {len(found)} metrics, allowed: at most {limit}{besides}")
    for name in found:
        if not isinstance(name, str) or not name.isprintable() or not 1 <= len(name) <= wire.METRIC_NAME_LIMIT:
            allowed = f"1 to {wire.METRIC_NAME_LIMIT} printable characters"
            raise RefusedError(f"{where}: metric name {name!r:.80} is not allowed (allowed: {allowed})")


def _item(value: mx.array) -> Any:
    return value.item()
