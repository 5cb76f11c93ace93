"""A toy task that keeps too much, in one of several ways. Tests search for the names and lines of this file."""

import random
from collections import deque

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

from mlx_worker.task import Task

FEATURES, CLASSES, SAMPLES = 8, 37, 48
GLOBAL_LOGITS = []


class Recorder:
    """Keeps what it is given."""

    def __init__(self):
        self.history = []


class Slotted:
    """Holds its array and the previous node in slots: a linked list."""

    __slots__ = ("before", "value")

    def __init__(self, value, before):
        self.value, self.before = value, before


class Disguised:
    """Lies about its class, has no length, and forbids inspection; counts attempts."""

    touched = 0

    @property
    def __class__(self):
        type(self).touched += 1
        raise RuntimeError("no class")

    @property
    def __dict__(self):
        type(self).touched += 1
        raise RuntimeError("no attributes")

    def __len__(self):
        type(self).touched += 1
        raise RuntimeError("no length")

    def __getattribute__(self, name):
        type(self).touched += 1
        raise RuntimeError("nothing to see")

    def __eq__(self, other):
        type(self).touched += 1
        raise RuntimeError("equal to nothing")

    __hash__ = None
    __bool__ = __repr__ = __sizeof__ = __iter__ = __len__


class HostileMeta(type):
    """A class that can't be hashed, compared or inspected."""

    touched = 0

    def __hash__(cls):
        HostileMeta.touched += 1
        raise RuntimeError("no hash")

    def __eq__(cls, other):
        HostileMeta.touched += 1
        raise RuntimeError("no comparison")

    def __getattribute__(cls, name):
        HostileMeta.touched += 1
        raise RuntimeError("no attribute")


class Hostile(dict, metaclass=HostileMeta):
    """A dictionary of that class, that can't be read either."""

    def __len__(self):
        Disguised.touched += 1
        raise RuntimeError("no length")

    __iter__ = __reversed__ = items = values = keys = __len__


def _model(seed):
    return nn.Sequential(nn.Linear(FEATURES, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, CLASSES))


def _task(loss, collate, after_update=None, compiled=False, **options):
    return Task(
        model=_model(0), optimizer=optim.AdamW(learning_rate=1e-2), loss=loss, dataset=range(SAMPLES), collate=collate,
        after_update=after_update, compile=compiled, fingerprint="leaky", **options,
    )  # fmt: skip


def _parts():
    xs = mx.array(np.sin(np.arange(SAMPLES * FEATURES, dtype=np.float32)).reshape(SAMPLES, FEATURES))
    ys = mx.array(np.arange(SAMPLES) % CLASSES)

    def collate(ids):
        chosen = mx.array(ids)
        return xs[chosen], ys[chosen]

    def loss(model, x, y):
        return nn.losses.cross_entropy(model(x), y, reduction="mean")

    return loss, collate


def healthy(seed, compiled=True):
    """Keeps its last losses, and a list of numbers."""
    plain_loss, collate = _parts()
    recent, losses = deque(maxlen=4), []

    def after_update(update):
        recent.append(mx.array(update.loss))
        losses.append({"step": update.step, "loss": update.loss})

    return _task(plain_loss, collate, after_update, compiled)


def kept_logits(seed):
    """A list that keeps every step's logits, in the loss function's closure."""
    _, collate = _parts()
    kept = []

    def loss(model, x, y):
        logits = model(x)
        kept.append(mx.stop_gradient(logits))
        mx.eval(kept[-1])
        return nn.losses.cross_entropy(logits, y, reduction="mean")

    return _task(loss, collate)


def growing_dict(seed):
    """A dictionary in a closure that has a new entry for every step."""
    loss, collate = _parts()
    cache = {}

    def after_update(update):
        cache[update.step] = [mx.full((3, 50), update.loss)]
        mx.eval(cache[update.step])

    return _task(loss, collate, after_update)


def unevaluated_metric(seed):
    """A sum that is never evaluated: one array, and a graph behind it that grows."""
    loss, collate = _parts()
    total = mx.zeros((5,))

    def after_update(update):
        nonlocal total
        total = total + mx.full((5,), update.loss)

    return _task(loss, collate, after_update, compiled=True)


def many_ways(seed, way):
    """Other holders: a global, an attribute, a slot, a default, a cycle, numpy arrays, arrays that are weights."""
    loss, collate = _parts()
    recorder, chain, copies = Recorder(), None, []

    def remember(value, seen=[]):  # noqa: B006 - that is the leak
        seen.append(value)

    def after_update(update):
        nonlocal chain
        value = mx.full((7, 11), update.loss)
        mx.eval(value)
        if way == "global":
            GLOBAL_LOGITS.append(value)
        elif way == "attribute":
            recorder.history.append((update.step, value))
        elif way == "slot":
            chain = Slotted(value, chain)
        elif way == "default":
            remember(value)
        elif way == "numpy":
            copies.append(np.full((64, 100), update.loss))
        elif way == "weights":
            copies.append(task.model.layers[3].weight + 0)
            mx.eval(copies)
        elif way == "cycle":
            ring = [mx.full((1000, 1000), update.loss)]
            mx.eval(ring)
            ring.append(ring)

    task = _task(loss, collate, after_update)
    return task


def hostile(seed):
    """Keeps logits among objects that forbid inspection; fails if one was inspected."""
    task = kept_logits(seed)
    strange = [[Disguised(), Hostile()]]
    strange.extend([[Hostile({"a": strange})] for _ in range(3)])

    def after_update(update):
        strange.append([Disguised(), Hostile(a=[mx.full((2, 2), update.loss)])])
        assert not Disguised.touched, "an object was inspected"
        assert not HostileMeta.touched, "a class was inspected"

    task.after_update = after_update
    return task


def drawing(seed):
    """Draws random numbers of all three kinds at every update."""
    task = healthy(seed)
    plain = task.collate

    def collate(ids):
        noise = random.random() + float(np.random.rand())
        x, y = plain(ids)
        return x + noise * mx.random.normal(x.shape), y

    task.collate = collate
    return task


def shapes(seed):
    """A batch of another shape at every update: a program more each time."""
    _, collate = _parts()
    lengths = iter(range(1, 1000))

    def loss(model, x, y, w):
        return nn.losses.cross_entropy(model(x), y, reduction="mean") + 0 * w.sum()

    return _task(loss, lambda ids: (*collate(ids), mx.zeros((next(lengths),))), compiled=True)


def graph_of_weights(seed):
    """A sum that is never evaluated, and keeps the weights of every step."""
    loss, collate = _parts()
    wide = nn.Linear(FEATURES, 4096)
    x = mx.ones((1, FEATURES))
    totals = {"outputs": mx.zeros((1, 1))}

    def after_update(update):
        wide.weight = wide.weight * 0.5
        mx.eval(wide.weight)
        totals["outputs"] = totals["outputs"] + wide(x).sum()

    return _task(loss, collate, after_update, compiled=True)
