"""The files that newcomers copy: they are accepted as they stand, and what they name exists."""

import importlib
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_supervisor.settings.reader import read_settings
from mlx_worker.data.batches import EffectiveBatches
from mlx_worker.tasks.mlx_lm.config import load_config

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.toml")), ids=lambda path: path.name)
def test_every_example_is_accepted(path: Path) -> None:
    settings = read_settings(path)
    for run in settings.runs.values():
        if run.task.config is not None:
            load_config(run.task.config, str(EXAMPLES))


def test_the_first_run_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(EXAMPLES), *sys.path])
    settings = read_settings(EXAMPLES / "first-run.toml").runs["run"]
    module, _, function = (settings.task.entry or "").partition(":")
    mx.random.seed(settings.seed)
    task = getattr(importlib.import_module(module), function)(**settings.task.args)
    first, second = task.dataset[0], task.dataset[1]
    assert first[-1] == second[0], "a window ends where the next begins, so that every byte is learned"
    assert len(task.dataset[len(task.dataset) - 1]) == len(first)

    (windows,) = task.collate([task.dataset[i] for i in EffectiveBatches(len(task.dataset), settings.seed).next(8)])
    value_and_grad = mx.value_and_grad(lambda parameters: task.loss(task.model.update(parameters), windows))
    before, tokens = task.loss(task.model, windows)
    for _ in range(5):
        _, gradients = value_and_grad(task.model.trainable_parameters())
        task.optimizer.update(task.model, gradients)
    after, _ = task.loss(task.model, windows)
    assert np.isclose(before.item(), np.log(256), atol=0.5)
    assert after.item() < before.item() - 0.5
    assert tokens.item() == 8 * settings.task.args["length"]
