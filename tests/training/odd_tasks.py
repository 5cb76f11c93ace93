"""The toy task with events at an exact moment."""

import itertools
import math
import os
import signal
from typing import Any

import mlx.core as mx
from slow_disk import build as build_slow
from toy_task import build as build_toy

from mlx_worker.task import EvaluationContext, Task, Update


def stopping(seed: int, at: int, every: int) -> Task:
    """Requests a stop once update `at` is done (0: while it is built). Evaluations and milestones every `every`."""
    task = build_toy(seed, evaluate_every=every)

    def stop_at(update: Update) -> None:
        if update.step == at:
            os.kill(os.getpid(), signal.SIGTERM)

    if at == 0:
        os.kill(os.getpid(), signal.SIGTERM)
    task.after_update = stop_at
    task.milestone = lambda step: print(f"milestone {step}")
    task.milestone_every_steps = every
    return task


def spoiled(seed: int, at: int, spoil: str = "nan", flush_s: float = 0.0, **args: Any) -> Task:
    """The loss of the `at`th update of this worker is NaN ("nan") or infinite ("inf"), and so are its gradients.

    With "nan reported" only the loss is, as where a loss is computed in half precision for nothing but the report.
    """
    task = build_slow(seed, flush_s, **args)
    plain_loss, plain_collate, calls = task.loss, task.collate, itertools.count(1)
    factor = {"nan": math.nan, "inf": math.inf, "nan reported": 1.0}[spoil]
    term = math.nan if spoil == "nan reported" else 0.0

    def collate(ids: list[int]) -> tuple[mx.array, ...]:
        spoils = next(calls) == at
        return *plain_collate(ids), mx.array(factor if spoils else 1.0), mx.array(term if spoils else 0.0)

    def loss(model: Any, x: mx.array, y: mx.array, w: mx.array, by: mx.array, plus: mx.array) -> Any:
        return plain_loss(model, x, y, w) * by + plus

    task.collate, task.loss = collate, loss
    return task


def masked(seed: int, at: int, **args: Any) -> Task:
    """The `at`th update of this worker has no token to learn: its mean is NaN, its weight 0."""
    task = build_toy(seed, weighted=True, **args)
    plain_loss, plain_collate, calls = task.loss, task.collate, itertools.count(1)

    def collate(ids: list[int]) -> tuple[mx.array, ...]:
        return *plain_collate(ids), mx.array(0.0 if next(calls) == at else 1.0)

    def loss(model: Any, x: mx.array, y: mx.array, w: mx.array, kept: mx.array) -> Any:
        mean, tokens = plain_loss(model, x, y, w)
        return mean * kept / kept, tokens * kept

    task.collate, task.loss = collate, loss
    return task


def failing_later(seed: int, at: int) -> Task:
    """Raises at its `at`th batch."""
    task = build_toy(seed)
    plain, calls = task.collate, itertools.count(1)

    def collate(ids: list[int]) -> tuple[mx.array, ...]:
        if next(calls) == at:
            raise ValueError("no more")
        return plain(ids)

    task.collate = collate
    return task


class OddError(Exception):
    """An error of a task's own."""


def failing(seed: int) -> Task:
    """Raises at its first batch, from another error, with a message that is not valid Unicode."""
    task = build_toy(seed)

    def collate(ids: list[int]) -> tuple[mx.array, ...]:
        try:
            raise KeyError(ids[0])
        except KeyError as error:
            raise OddError("\udcff no batch") from error

    task.collate = collate
    return task


def evaluating(seed: int) -> Task:
    """Prints the size of MLX's cache after every batch of an evaluation."""
    task = build_toy(seed, evaluate_every=5)

    def evaluate(model: Any, context: EvaluationContext) -> float:
        for _ in range(3):
            mx.eval(mx.zeros((500, 500)) + 1)
            context.progress()
            print("cached", mx.get_cache_memory())
        return 0.0

    task.evaluate = evaluate
    return task
