"""Tasks for the tests of the worker: small, with dropout, a schedule and running statistics."""

import math
import time

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim

from mlx_worker.task import Task

FEATURES = 8


def _data(samples):
    # Made without the generators, so that the data never depends on how many numbers were drawn before.
    xs = mx.array([[math.sin(1.7 * i + 0.3 * j * j) for j in range(FEATURES)] for i in range(max(1, samples))])
    return xs, (xs.sum(axis=1) > 0).astype(mx.int32)


def build(
    seed, samples=48, hidden=16, dropout=0.2, rate=1e-2, schedule=True, norm=False, weighted=False,
    optimizer="AdamW", evaluate_every=0, fail_export=False, nan=False, pause_s=0.0, weightless=False,
    lengths=None, frozen_layers=0,
):  # fmt: skip
    xs, ys = _data(samples)
    layers = [nn.Linear(FEATURES, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, 2)]
    if norm:
        layers.insert(1, nn.BatchNorm(hidden))

    for layer in layers[:frozen_layers]:
        layer.freeze()

    def loss(model, x, y, w):
        losses = nn.losses.cross_entropy(model(x), y, reduction="none")
        if not weighted:
            return losses.mean()
        weight = w.sum()
        return (losses * w).sum() / weight, weight

    def collate(ids):
        time.sleep(pause_s)
        chosen = mx.array(ids)
        # Sample 3 weighs nothing, as one whose every token is masked.
        weights = mx.array([0.0 if i == 3 or weightless else 1.0 + i % 4 for i in ids])
        return xs[chosen] * (math.nan if nan else 1.0), ys[chosen], weights

    def evaluate(model, context):
        total = 0.0
        for start in range(0, samples, context.batch_size):
            total += 0 * mx.random.uniform().item() + model(xs[start : start + context.batch_size]).sum().item()
            context.progress()
        return total

    def export(folder):
        if fail_export:
            raise OSError("no space for the export")
        (folder / "done.txt").write_text("exported")

    return Task(
        model=nn.Sequential(*layers),
        optimizer=getattr(optim, optimizer)(learning_rate=optim.cosine_decay(rate, 200) if schedule else rate),
        loss=loss,
        dataset=range(samples),
        collate=collate,
        evaluate=evaluate,
        evaluate_every_steps=evaluate_every,
        export=export,
        fingerprint=f"sines {samples}",
        lengths=lengths and [1 + 7 * i % lengths for i in range(samples)],
    )


def not_a_task(seed):
    return {"model": seed}


def frozen(seed):
    task = build(seed)
    task.model.freeze()
    return task


def bad_loss(seed):
    task = build(seed)
    task.loss = lambda model, x, y, w: model(x)
    return task


def leaves():
    raise SystemExit(0)


LIMIT = 3


def frozen_not(seed):
    return build(seed)


def reads_a_value(seed):
    task = build(seed, dropout=0.0)
    plain = task.loss
    task.loss = lambda model, *arrays: plain(model, *arrays) * (2.0 if plain(model, *arrays).item() > 9 else 1.0)
    return task


def reads_a_value_uncompiled(seed):
    task = reads_a_value(seed)
    task.compile = False
    return task
