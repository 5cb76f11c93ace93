"""A task that can have every feature of `Task`, by name; its result depends on each being restored exactly."""

import math
import time

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim

from mlx_worker.task import Task

FEATURES = 8
STREAM_SAMPLES = 22


class Stream:
    """Sample ids in an order that depends on the epoch; 22 of them, so that batches of 8 span epochs."""

    def __init__(self, samples=STREAM_SAMPLES):
        self.samples, self.epoch = samples, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        for i in range(self.samples):
            yield (i * 5 + self.epoch) % self.samples


class PositionedStream(Stream):
    """Restores its own position: the samples before it are not read again."""

    def __init__(self):
        super().__init__()
        self.at, self.read = 0, 0

    def __iter__(self):
        while self.at < self.samples:
            self.at += 1
            self.read += 1
            yield (self.at * 5 + self.epoch) % self.samples
        self.at = 0

    def state_dict(self):
        return {"at": self.at, "shift": mx.array([self.at])}

    def load_state_dict(self, state):
        assert state["shift"].item() == state["at"]
        self.at = state["at"]


class Indexed:
    """No length: the order is 0, 1, 2, …"""

    def __getitem__(self, index):
        if index >= STREAM_SAMPLES:
            raise IndexError(index)
        return index


DATASETS = {"skipped stream": Stream, "positioned stream": PositionedStream, "indexed": Indexed}
ALL = ["clipped", "averaged", "metrics", "state", "positioned stream"]


def build(seed, features=(), rate=1e-2, optimizer="AdamW", pause_s=0.0, evaluate_every=0, dropout=0.2):
    xs = mx.array([[math.sin(1.7 * i + 0.3 * j * j) for j in range(FEATURES)] for i in range(48)])
    ys = (xs.sum(axis=1) > 0).astype(mx.int32)
    model = nn.Sequential(nn.Linear(FEATURES, 16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 2))
    seen = {"scale": mx.ones((FEATURES,)), "count": 0, "last": [], "raw": b"\x00\xff", "none": math.inf}

    def loss(model, x, y):
        logits = model(x)
        mean = nn.losses.cross_entropy(logits, y, reduction="mean")
        if "metrics" not in features:
            return mean
        accuracy = (logits.argmax(axis=1) == y).mean()
        return mean, {"accuracy": accuracy, "broken": mean * math.nan}

    def collate(ids):
        time.sleep(pause_s)
        chosen = mx.array(ids)
        if "state" in features:  # the data depends on what was seen before
            seen["scale"] = 0.9 * seen["scale"] + 0.1 * mx.abs(xs[chosen]).mean(axis=0)
            seen["count"] += len(ids)
            seen["last"] = list(ids)
        return xs[chosen] / seen["scale"] * (1 + seen["count"] / 1000), ys[chosen]

    def evaluate(model, context):
        return model(xs).sum().item(), {"positive": (model(xs).argmax(axis=1)).mean()}

    task = Task(
        model=model,
        optimizer=getattr(optim, optimizer)(learning_rate=rate),
        loss=loss,
        dataset=next((DATASETS[name]() for name in features if name in DATASETS), range(48)),
        collate=collate,
        evaluate=evaluate,
        evaluate_every_steps=evaluate_every,
        batch_size=8,
        export=lambda folder: model.save_weights(str(folder / "exported.safetensors")),
    )
    if "clipped" in features:
        task.max_grad_norm = 0.05
    if "averaged" in features:
        task.ema_decay = 0.9
    if "state" in features:
        task.state, task.load_state = lambda: dict(seen), seen.update
    return task
