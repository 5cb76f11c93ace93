"""A python task whose memory grows by a known amount per sample: its logits are large."""

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

from mlx_worker.task import Task


def build(vocabulary=512, length=64, samples=16, hidden=16):
    model = nn.Sequential(nn.Embedding(vocabulary, hidden), nn.Linear(hidden, vocabulary))
    tokens = [np.arange(number, number + length, dtype=np.int32) * 31 % vocabulary for number in range(samples)]
    1 // vocabulary  # as a user's own code would fail

    def loss(model, batch):
        return nn.losses.cross_entropy(model(batch), batch, reduction="mean")

    return Task(
        model=model,
        optimizer=optim.Adam(learning_rate=1e-3),
        loss=loss,
        dataset=tokens,
        collate=lambda chosen: (mx.array(np.stack(chosen)),),
        batch_size=2,
    )
