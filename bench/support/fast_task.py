"""A task of short steps: a tiny model, each update paced to `step_ms` milliseconds."""

import time
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim

from mlx_worker.task import Task


def build(step_ms: float = 2.0, width: int = 32) -> Task:
    """A linear model; the data loading waits until the step's time is up."""
    model = nn.Linear(width, width)
    next_s = 0.0

    def collate(chosen: list[mx.array]) -> tuple[mx.array]:
        nonlocal next_s
        now_s = time.perf_counter()
        if next_s > now_s:
            time.sleep(next_s - now_s)
        next_s = max(next_s, now_s) + step_ms / 1000
        return (mx.stack(chosen),)

    def loss(model: Any, inputs: mx.array) -> tuple[mx.array, mx.array]:
        return ((model(inputs) - inputs) ** 2).mean(), mx.array(inputs.shape[0])

    return Task(
        model=model, optimizer=optim.SGD(learning_rate=1e-3), loss=loss,
        dataset=[mx.random.normal((width,)) for _ in range(64)], collate=collate,
        fingerprint=f"fast {width}",
    )  # fmt: skip
