"""What each feature of a task does, against a computation of its own."""

import itertools
import json
import math

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten
from tests.training.own_task import harness

from mlx_worker.errors import RefusedError
from mlx_worker.task import Task


def copied(model):
    return {name: np.array(value) for name, value in tree_flatten(model.trainable_parameters())}


def norm_of(before, after):
    return math.sqrt(sum(float(((after[name] - before[name]) ** 2).sum()) for name in before))


@pytest.mark.parametrize("size", [8, 4, 3])
def test_gradients_are_clipped_by_their_global_norm_however_the_update_is_split(tmp_path, monkeypatch, size):
    """With SGD and a rate of 1 the weights move by the gradient."""
    weights = []

    def changes(task):
        task.max_grad_norm = 0.05
        weights.append(copied(task.model))
        task.after_update = lambda update: weights.append(copied(task.model))

    args = {"optimizer": "SGD", "rate": 1.0, "dropout": 0.0}
    link = harness.run(
        tmp_path / "r", monkeypatch, steps=3, args=args, changes=changes, batch={"size": size, "effective": 8}
    )
    norms = [norm_of(before, after) for before, after in itertools.pairwise(weights)]
    assert norms == pytest.approx([0.05] * 3, rel=1e-3)
    assert all(step.metrics["grad_norm"] > 0.05 for step in link.steps)
    whole = harness.run(tmp_path / "w", monkeypatch, steps=3, args=args, max_grad_norm=0.05)
    assert link.losses == pytest.approx(whole.losses, abs=1e-5)
    assert [step.metrics["grad_norm"] for step in link.steps] == pytest.approx(
        [step.metrics["grad_norm"] for step in whole.steps], rel=1e-4
    )


def test_a_limit_above_the_norm_changes_no_bit_and_the_settings_count_over_the_task(tmp_path, monkeypatch):
    plain = harness.run(tmp_path / "plain", monkeypatch, steps=3)
    high = harness.run(tmp_path / "high", monkeypatch, steps=3, max_grad_norm=1e6)
    off = harness.run(tmp_path / "off", monkeypatch, steps=3, args={"features": ["clipped"]}, max_grad_norm=0.0)
    assert plain.weights == high.weights == off.weights
    assert plain.steps[0].metrics == off.steps[0].metrics == {}
    assert high.steps[0].metrics["grad_norm"] > 0


def test_the_average_is_exact_and_is_what_evaluation_milestone_and_export_see(tmp_path, monkeypatch):
    weights, seen = [], {}

    def changes(task):
        task.ema_decay = 0.9
        weights.append(copied(task.model))
        task.after_update = lambda update: weights.append(copied(task.model))
        task.evaluate = lambda model, context: seen.update(evaluated=copied(model)) or 0.0
        task.milestone, task.milestone_every_steps = lambda step: seen.update(milestone=copied(task.model)), 4
        task.test = lambda model, context: seen.update(tested=copied(model)) or "tested"

    harness.run(tmp_path / "r", monkeypatch, steps=4, args={"evaluate_every": 4}, changes=changes)
    expected = weights[0]
    for each in weights[1:]:
        expected = {name: value + np.float32(0.1) * (each[name] - value) for name, value in expected.items()}
    exported = mx.load(str(tmp_path / "r" / "export" / "exported.safetensors"))
    saved = harness.arrays(tmp_path / "r", 4, "ema.safetensors")
    last = harness.arrays(tmp_path / "r", 4, "model.safetensors")
    for name, value in expected.items():
        for found in (saved[name], exported[name], *(each[name] for each in seen.values())):
            assert np.allclose(np.array(found), value, atol=1e-6)
        assert np.array_equal(np.array(last[name]), weights[-1][name]), "the checkpoint has the trained weights, too"
    assert set(seen) == {"evaluated", "milestone", "tested"}
    assert norm_of(expected, weights[-1]) > 1e-3


def test_averages_of_half_precision_weights_keep_small_changes(tmp_path, monkeypatch):
    def changes(task):
        task.model.set_dtype(mx.bfloat16)
        task.ema_decay = 0.9999

    harness.run(tmp_path / "r", monkeypatch, steps=2, changes=changes)
    saved = harness.arrays(tmp_path / "r", 2, "ema.safetensors")
    last = harness.arrays(tmp_path / "r", 2, "model.safetensors")
    assert {value.dtype for value in saved.values()} == {mx.float32}
    exported = mx.load(str(tmp_path / "r" / "export" / "exported.safetensors"))
    assert {value.dtype for value in exported.values()} == {mx.bfloat16}
    assert any(mx.any(saved[name] != saved[name].astype(mx.bfloat16)).item() for name in last)


def test_metrics_are_averaged_like_the_loss(tmp_path, monkeypatch):
    args = {"features": ["metrics"], "dropout": 0.0, "evaluate_every": 3}
    whole = harness.run(tmp_path / "whole", monkeypatch, steps=3, args=args)
    split = harness.run(tmp_path / "split", monkeypatch, steps=3, args=args, batch={"size": 3, "effective": 8})
    for one, other in zip(whole.steps, split.steps, strict=True):
        assert other.metrics["accuracy"] == pytest.approx(one.metrics["accuracy"], abs=1e-5)
        assert one.metrics["accuracy"] * 8 == pytest.approx(round(one.metrics["accuracy"] * 8), abs=1e-5)
        assert one.metrics["broken"] is other.metrics["broken"] is None, "not a finite number"
    assert whole.validations[-1].metrics == {"positive": pytest.approx(split.validations[-1].metrics["positive"])}


def test_weighted_metrics_follow_the_weights(tmp_path, monkeypatch):
    def changes(task):
        task.loss = lambda model, x, y: (
            nn.losses.cross_entropy(model(x), y).mean(), y.sum() + 1, {"weight": (y.sum() + 1) * 1.0, "one": 1}
        )  # fmt: skip

    link = harness.run(tmp_path / "r", monkeypatch, steps=1, changes=changes, batch={"size": 4, "effective": 8})
    weights = link.steps[0].tokens
    assert link.steps[0].metrics["one"] == pytest.approx(1.0)
    assert weights / 2 <= link.steps[0].metrics["weight"] <= weights, "the mean of a and b, weighted by a and b"


@pytest.mark.parametrize(
    ("result", "loss"), [("fine", None), (("Test loss 2.", 2.0), 2.0), (("Test loss nan.", math.nan), math.nan)]
)
def test_the_result_of_the_test_is_reported(tmp_path, monkeypatch, result, loss):
    def tested(task):
        task.test = lambda model, context: result

    (report,) = harness.run(tmp_path, monkeypatch, steps=1, changes=tested).tests
    assert (report.text, str(report.loss)) == (result if loss is None else result[0], str(loss))


def test_numbers_of_numpy_are_numbers(tmp_path, monkeypatch):
    """As metrics of an evaluation and in the task's state, where a careless mean makes them after the first update."""
    seen, loaded = {"best": None}, {}

    def changes(task):
        task.evaluate = lambda model, context: (np.float32(1.5), {"a": np.float32(0.1), "b": np.int64(3), "c": True})
        task.after_update = lambda update: seen.update(best=np.mean(np.float32([0.1, 0.2])), count=np.int64(2))
        task.state, task.load_state = lambda: seen, loaded.update

    args = {"evaluate_every": 1}
    first = harness.run(tmp_path / "r", monkeypatch, steps=1, args=args, changes=changes)
    assert first.validations[-1].metrics == {"a": pytest.approx(0.1), "b": 3.0, "c": 1.0}
    harness.run(tmp_path / "r", monkeypatch, steps=2, generation=2, args=args, changes=changes)
    assert loaded == {"best": float(np.mean(np.float32([0.1, 0.2]))), "count": 2}


def test_state_that_an_update_makes_unstorable_is_refused_at_once(tmp_path, monkeypatch):
    seen, collated = {"mean": None}, []

    def changes(task):
        def collate(ids, plain=task.collate):
            collated.append(ids)
            seen["mean"] = np.zeros(3)
            return plain(ids)

        task.collate, task.state, task.load_state = collate, lambda: seen, seen.update

    with pytest.raises(RefusedError, match=r"Task\.state\['mean'\]: found numpy\.ndarray, allowed: "):
        harness.run(tmp_path / "r", monkeypatch, steps=50, changes=changes)
    assert len(collated) == 1, "not after 50 updates"


def test_after_update_sees_the_model_of_its_update(tmp_path, monkeypatch):
    """The reference saves a checkpoint after every update, with nothing in flight."""
    seen, reported = {}, []

    def changes(task):
        task.after_update = lambda update: seen.update({update.step: copied(task.model)})
        task.report_update = lambda update: reported.append((update.step, update.metrics))

    harness.run(tmp_path / "r", monkeypatch, steps=6, changes=changes, args={"features": ["metrics"]})
    checkpoint = {"every_seconds": 0, "every_steps": 1, "keep": 10}
    harness.run(tmp_path / "saved", monkeypatch, steps=6, args={"features": ["metrics"]}, checkpoint=checkpoint)
    for step in range(1, 7):
        for name, value in harness.arrays(tmp_path / "saved", step, "model.safetensors").items():
            assert np.array_equal(np.array(value), seen[step][name]), step
    assert [step for step, _ in reported] == list(range(1, 7))
    assert set(reported[0][1]) == {"accuracy", "broken"}


def linear(dataset, **fields):
    """A task whose samples are numbers."""
    mx.random.seed(0)  # an error inside a compiled function leaves the generator's state unusable
    return Task(
        model=nn.Linear(1, 1),
        optimizer=optim.SGD(learning_rate=0.01),
        loss=lambda model, x: mx.square(model(x)).mean(),
        collate=lambda samples: mx.array([[float(each)] for each in samples]),
        dataset=dataset,
        batch_size=4,
        **fields,
    )


def ids(folder):
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    return [(line["epoch"], line["samples"]) for line in lines]


class Numbers:
    def __init__(self, *counts):
        self.counts, self.epochs = list(counts), []

    def set_epoch(self, epoch):
        self.epochs.append(epoch)

    def __iter__(self):
        return iter(range(self.counts[min(self.epochs[-1], len(self.counts) - 1)]))


def test_a_finite_stream_begins_anew_and_a_batch_may_span_epochs(tmp_path, monkeypatch):
    dataset = Numbers(6)
    harness.run(tmp_path / "r", monkeypatch, linear(dataset), steps=3, batch={"sample_log": True})
    assert ids(tmp_path / "r") == [(0, [0, 1, 2, 3]), (0, [4, 5, 0, 1]), (1, [2, 3, 4, 5])]
    assert dataset.epochs == [0, 1]


def test_an_infinite_stream_is_read_no_further_than_needed(tmp_path, monkeypatch):
    counter = itertools.count()
    harness.run(tmp_path / "r", monkeypatch, linear(counter), steps=5)
    assert next(counter) == 20


def test_a_dataset_without_a_length_is_read_in_order(tmp_path, monkeypatch):
    class Unsized:
        def __getitem__(self, index):
            return [0.5, 1, 2, 3, 4, 5][index]

    harness.run(tmp_path / "r", monkeypatch, linear(Unsized()), steps=3, batch={"sample_log": True})
    assert ids(tmp_path / "r") == [(0, [0, 1, 2, 3]), (0, [4, 5, 0, 1]), (1, [2, 3, 4, 5])]


def test_a_stream_that_ends_too_early_loses_no_update(tmp_path, monkeypatch):
    """A generator has one epoch; the code is then given an __iter__, and training continues."""
    job = {"steps": 5, "checkpoint": {"every_seconds": 0, "every_steps": 100}, "batch": {"sample_log": True}}
    with pytest.raises(RefusedError, match="gave 14 samples in epoch 0 and none in epoch 1"):
        harness.run(tmp_path / "r", monkeypatch, linear(iter(range(14))), **job)
    assert harness.checkpoint(tmp_path / "r", 3).is_dir()
    harness.run(tmp_path / "r", monkeypatch, linear(Numbers(14)), generation=2, **job)
    whole = harness.run(tmp_path / "whole", monkeypatch, linear(Numbers(14)), **job)
    assert ids(tmp_path / "r") == ids(tmp_path / "whole")
    assert harness.digests(tmp_path / "r", 5) == harness.digests(tmp_path / "whole", 5)
    assert len(whole.losses) == 5


def test_a_stream_with_a_position_of_its_own_that_ends_too_early_is_skipped_at_the_resume(tmp_path, monkeypatch):
    def ending(task):
        task.dataset.set_epoch = lambda epoch: setattr(task.dataset, "samples", 22 if epoch == 0 else 0)

    job = {"args": {"features": ["positioned stream"]}, "steps": 5}
    with pytest.raises(RefusedError, match="none in epoch 1"):
        harness.run(tmp_path / "r", monkeypatch, changes=ending, **job)
    second = harness.run(tmp_path / "r", monkeypatch, generation=2, **job)
    assert any(note.startswith("Skipped 16 samples") for note in second.notes)
    assert second.weights == harness.run(tmp_path / "whole", monkeypatch, **job).weights


def test_a_stream_may_inherit_an_index_that_only_raises(tmp_path, monkeypatch):
    """As torch's IterableDataset does."""

    class Inheriting(Numbers):
        def __getitem__(self, index):
            raise NotImplementedError

    assert len(harness.run(tmp_path / "r", monkeypatch, linear(Inheriting(6)), steps=3).losses) == 3
