"""Gradients of one update: micro-batch by micro-batch, summed by weight, divided once."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from mlx_worker.errors import RefusedError
from mlx_worker.extras.ema import WeightAverage
from mlx_worker.supervision.raised import errors_of
from mlx_worker.task import Task
from mlx_worker.training import groups
from mlx_worker.training import metrics as own_metrics

SHAPES_LIMIT = 64
"""mx.compile keeps a program per shape and never evicts: after this many, all are dropped and compiled again."""

NORM_EPSILON = 1e-6
"""As in mlx.optimizers.clip_grad_norm and PyTorch."""


@dataclass(frozen=True)
class Applied:
    """An update that the device may still be computing: mean loss, sum of weights, learning rate, metrics."""

    loss: mx.array
    weight: mx.array
    rate: mx.array | None
    metrics: dict[str, mx.array] = field(default_factory=dict)

    def wait(self) -> tuple[float, float, float]:
        """The first three as numbers, once the update is done. Raises the device's errors."""
        mx.eval(self.loss, self.weight, self.metrics)
        return _number(self.loss), _number(self.weight), 0.0 if self.rate is None else _number(self.rate)


class Gradients:
    """Computes gradients and applies them. A single micro-batch is the plain, unscaled step in one compiled program;
    in two where something happens between its gradients and the update (`splits`).

    Several micro-batches are sums of weight x gradient in float32, divided by the sum of weights: a micro-batch without
    weight (every token masked) counts as zero, where its mean would be NaN. In groups (`ends_group`, see `groups`),
    this gives the mean of each group, and the update has the mean of these.
    Metrics are averaged like the loss. With `Task.max_grad_norm`, the mean gradients are clipped to that global norm.
    """

    def __init__(self, task: Task, *, splits: bool = False, average: WeightAverage | None = None) -> None:
        self._task = task
        self._average = average or WeightAverage(task)
        self._splits = splits
        self._value_and_grad = nn.value_and_grad(task.model, self._loss)
        self.counts_tokens = False
        self._sums: Any = None
        self._groups: Any = None
        self._group_count = 0
        self._done: tuple[mx.array, mx.array, dict[str, mx.array]] | None = None
        self._metric_names: list[str] | None = None
        self._before: mx.array | None = None
        self._alone = True
        self._shapes: set[Any] = set()
        self._prepare()

    def add(self, arrays: tuple[Any, ...], samples: int, *, alone: bool, ends_group: bool = False) -> None:
        """The gradients of a micro-batch. `alone`: it is the whole update. Nothing is evaluated yet."""
        self._bound_shapes(arrays, alone)
        self._alone = alone
        count = mx.array(samples, mx.float32)
        if alone and not self._splits:
            self._done = self._whole(count, *arrays)
        elif alone:
            self._sums = self._plain(count, *arrays)
        elif self._sums is None and ends_group:  # the whole group: bit for bit mlx_lm's gradients
            self._add_group(groups.without_nan(self._plain(count, *arrays)))
        elif self._sums is None:
            self._sums = self._first(count, *arrays)
        else:
            self._sums = self._further(self._sums, count, *arrays)
            if ends_group:
                sums, self._sums = self._sums, None
                self._add_group(groups.mean_of(sums))

    def _add_group(self, means: Any) -> None:
        self._groups = means if self._groups is None else groups.added(self._groups, means)
        self._group_count += 1

    @property
    def shapes(self) -> int:
        """Micro-batch shapes that have a compiled program now."""
        return len(self._shapes)

    def evaluate(self, *, waiting: bool) -> None:
        """Compute the micro-batches added so far, so that their activations are dropped.

        Without `waiting`, the last one may still be running when this returns.
        """
        sums = [each for each in (self._sums, self._groups) if each is not None]
        if waiting:
            mx.eval(sums, self._task.model.state, mx.random.state)
            return
        mx.async_eval(sums, self._task.model.state, mx.random.state)
        if self._before is not None:
            mx.eval(self._before)
        self._before = sums[0][1]

    def apply(self) -> Applied:
        """Update the weights. The device starts computing at once, so that no graph piles up."""
        if self._done is None:
            sums, self._sums, self._before = self._sums, None, None
            if self._groups is not None:
                sums, self._groups = self._groups, None
                count, self._group_count = mx.array(self._group_count, mx.float32), 0
                self._done = self._update_by_groups(sums, count)
            else:
                self._done = (self._update if self._alone else self._update_by_mean)(sums)
            del sums
        (loss, weight, metrics), self._done = self._done, None
        rate = _learning_rate(self._task)
        state = [self._task.model.state, self._task.optimizer.state, self._average.arrays, mx.random.state]
        mx.async_eval(loss, weight, metrics, state)
        return Applied(loss, weight, rate, metrics)

    def _loss(self, count: mx.array, *arrays: Any) -> tuple[mx.array, mx.array, dict[str, mx.array]]:
        try:
            result = self._task.loss(self._task.model, *arrays)
        except ValueError as error:
            if not self._task.compile or not str(error).startswith(_READS_A_VALUE):
                raise
            raise RefusedError(_untraceable(error)) from error
        parts = list(result) if isinstance(result, tuple | list) else [result]
        metrics = parts.pop() if len(parts) > 1 and isinstance(parts[-1], Mapping) else {}
        self.counts_tokens = len(parts) == 2
        if len(parts) not in (1, 2) or not isinstance(parts[0], mx.array) or parts[0].size != 1:
            raise RefusedError(
                "Task.loss must return a scalar mean, or (scalar mean, weight), either also with a dict of metrics as "
                "the last item; found " + _describe(result)
            )
        weight = mx.array(parts[1]) if self.counts_tokens else count
        if weight.size != 1:
            raise RefusedError("Task.loss: the weight must be a scalar, found " + _describe(weight))
        return parts[0].squeeze(), weight.astype(mx.float32).squeeze(), self._checked(metrics)

    def _checked(self, metrics: Mapping[str, Any]) -> dict[str, mx.array]:
        """The metrics, with the same names in every micro-batch: they could not be averaged otherwise."""
        added = self._task.max_grad_norm is not None and own_metrics.GRAD_NORM not in metrics
        arrays = own_metrics.arrays_of(metrics, "Task.loss", added=int(added))
        names = sorted(arrays)
        if self._metric_names is not None and names != self._metric_names:
            raise RefusedError(
                f"Task.loss must return the same metrics every time; found {', '.join(names) or 'none'}, "
                f"before {', '.join(self._metric_names) or 'none'}"
            )
        self._metric_names = names
        return arrays

    def _prepare(self) -> None:
        model, optimizer, average = self._task.model, self._task.optimizer, self._average.arrays
        forward, update = [model.state, mx.random.state], [model.state, optimizer.state, average]
        self._whole = self._compiled(self._whole_step, [*update, mx.random.state])
        self._plain = self._compiled(self._plain_step, forward)
        self._first = self._compiled(self._first_step, forward)
        self._further = self._compiled(self._further_step, forward)
        self._update = self._compiled(self._update_step, update)
        self._update_by_mean = self._compiled(self._update_by_mean_step, update)
        self._update_by_groups = self._compiled(self._update_by_groups_step, update)

    def _compiled(self, function: Callable[..., Any], state: list[Any]) -> Callable[..., Any]:
        return mx.compile(function, inputs=state, outputs=state) if self._task.compile else function

    def _bound_shapes(self, arrays: tuple[Any, ...], alone: bool) -> None:
        shapes = (alone, *((array.shape, array.dtype) for array in arrays))
        if shapes in self._shapes:
            return
        if len(self._shapes) >= SHAPES_LIMIT:
            self._shapes.clear()
            self._prepare()
        self._shapes.add(shapes)

    def _whole_step(self, count: mx.array, *arrays: Any) -> tuple[mx.array, mx.array, dict[str, mx.array]]:
        return self._update_step(self._plain_step(count, *arrays))

    def _plain_step(self, count: mx.array, *arrays: Any) -> Any:
        (loss, weight, metrics), gradients = self._value_and_grad(count, *arrays)
        if self.counts_tokens:  # bit for bit the gradients, unless every token is masked and they are NaN
            gradients = tree_map(lambda gradient: mx.where(weight > 0, gradient, 0.0), gradients)
        return loss, weight, metrics, gradients

    def _first_step(self, count: mx.array, *arrays: Any) -> Any:
        (loss, weight, metrics), gradients = self._value_and_grad(count, *arrays)
        metrics, gradients = tree_map(lambda value: _weighted(value, weight), (metrics, gradients))
        return _weighted(loss, weight), weight, metrics, gradients

    def _further_step(self, sums: Any, count: mx.array, *arrays: Any) -> Any:
        return tree_map(mx.add, sums, self._first_step(count, *arrays))

    def _update_step(self, sums: Any) -> tuple[mx.array, mx.array, dict[str, mx.array]]:
        loss, weight, metrics, gradients = sums
        return loss, weight, metrics | self._apply(gradients)

    def _update_by_mean_step(self, sums: Any) -> tuple[mx.array, mx.array, dict[str, mx.array]]:
        loss, weight, metrics, gradients = sums
        total_weight = mx.where(weight > 0, weight, 1.0)
        norm = self._apply(tree_map(lambda total: total / total_weight, gradients))
        return loss / weight, weight, tree_map(lambda total: total / weight, metrics) | norm

    def _update_by_groups_step(self, sums: Any, count: mx.array) -> tuple[mx.array, mx.array, dict[str, mx.array]]:
        return self._update_step(groups.mean_of_groups(sums, count))

    def _apply(self, gradients: Any) -> dict[str, mx.array]:
        """Clip the gradients if requested, update weights and average; returns `grad_norm` if it is a metric."""
        limit, norm = self._task.max_grad_norm, None
        if limit is not None:
            norm = _global_norm(gradients)
            factor = mx.minimum(limit / (norm + NORM_EPSILON), 1.0)
            gradients = tree_map(lambda gradient: gradient * factor, gradients)
        parameters = self._task.model.trainable_parameters()
        gradients = tree_map(lambda gradient, like: gradient.astype(like.dtype), gradients, parameters)
        self._task.optimizer.update(self._task.model, gradients)
        self._average.update()
        shown = norm is not None and own_metrics.GRAD_NORM not in (self._metric_names or ())
        return {own_metrics.GRAD_NORM: norm} if norm is not None and shown else {}


def _global_norm(gradients: Any) -> mx.array:
    """The norm of all gradients as one vector, summed in float32: in half precision large squares overflow."""
    squares: Any = [mx.square(gradient.astype(mx.float32)).sum() for _, gradient in _flat(gradients)]
    return mx.sqrt(sum(squares, start=mx.array(0.0)))


def _flat(tree: Any) -> list[tuple[str, mx.array]]:
    pairs: Any = tree_flatten(tree)
    return list(pairs)


_READS_A_VALUE = "[eval] Attempting to eval an array during function transformations"


def _untraceable(error: ValueError) -> str:
    place = errors_of(error)[0]
    where = f" at {place.file}:{place.line}" if place.file else ""
    return (
        f"Task.loss reads an array's value{where} (.item(), float(), if, print or numpy), which mx.compile cannot "
        "trace: compute with arrays alone, or return Task(…, compile=False)"
    )


def _learning_rate(task: Task) -> mx.array | None:
    try:
        rate = task.optimizer.learning_rate
    except (AttributeError, KeyError):  # Adafactor may compute its own at every step
        return None
    return rate if isinstance(rate, mx.array) else mx.array(rate)


def _number(value: mx.array) -> float:
    number: Any = value.item()
    return float(number)


def _weighted(value: mx.array, weight: mx.array) -> mx.array:
    return mx.where(weight > 0, value.astype(mx.float32) * weight, 0.0)


def _describe(value: Any) -> str:
    if isinstance(value, mx.array):
        return f"an array of shape {tuple(value.shape)}"
    if isinstance(value, tuple | list):
        return f"{type(value).__name__} of " + ", ".join(_describe(item) for item in value[:4])
    return type(value).__name__
