"""A wrong field of a task is refused by name, with what was found and what is allowed."""

import mlx.core as mx
import pytest
from tests.training.own_task import harness
from tests.training.own_task.test_features import Numbers, linear

from mlx_worker.data.sources import SampleError
from mlx_worker.errors import RefusedError


def loss_of(*more):
    return lambda model, x: (mx.square(model(x)).mean(), *more)


def failing():
    yield from range(5)
    raise KeyError("text")


class Failing(list):
    def __getitem__(self, index):
        raise KeyError("text")


FIELDS = {
    "dataset": ({"dataset": 5}, r"Task.dataset must be .*an iterable with a fixed order, found int"),
    "no order": ({"dataset": {1, 2}}, r"Task.dataset must be .*an iterable with a fixed order, found set"),
    "norm": ({"max_grad_norm": 0}, r"Task.max_grad_norm must be a number above 0, or None, found 0"),
    "norm's type": ({"max_grad_norm": True}, r"Task.max_grad_norm must be .* found True"),
    "decay": ({"ema_decay": 1.0}, r"Task.ema_decay must be a number above 0 and below 1, or None, found 1.0"),
    "no load_state": ({"state": dict}, r"Task.load_state is missing: set both"),
    "state": ({"state": 5, "load_state": print}, r"Task.state must be a function, found int"),
    "lengths": (
        {"dataset": iter([1]), "lengths": [1]},
        r"Task.lengths needs a Task.dataset with len\(\) and \[index\]",
    ),
    "a set": ({"state": lambda: {"a": [1, {2}]}, "load_state": print}, r"Task.state\['a'\]\[1\]: found set, allowed: "),
    "a key": ({"state": lambda: {1: 2}, "load_state": print}, r"Task.state: key 1 is not allowed"),
    "large": ({"state": lambda: "x" * 2**21, "load_state": print}, r"Task.state: .* bytes as JSON, allowed: at most"),
    "metrics": ({"loss": loss_of({f"m{i}": 1 for i in range(17)})}, r"found 17 metrics, allowed: at most 16"),
    "with norm": (
        {"loss": loss_of({f"m{i}": 1 for i in range(16)}), "max_grad_norm": 1.0},
        r"found 16 metrics, allowed: at most 15 besides grad_norm",
    ),
    "a vector": (
        {"loss": loss_of({"a": mx.zeros(3)})},
        r"metric 'a' must be a number .* found an array of shape \(3,\)",
    ),
    "a name": ({"loss": loss_of({"a\n": 1.0})}, r"metric name 'a\\n' is not allowed"),
    "a long name": ({"loss": loss_of({"a" * 65: 1.0})}, r"allowed: 1 to 64 printable characters"),
    "a text": ({"loss": loss_of({"a": "b"})}, r"metric 'a' must be a number or a scalar mx.array, found str"),
    "four": ({"loss": loss_of(1, {}, 2)}, r"Task.loss must return a scalar mean, or"),
    "evaluation": (
        {"evaluate": lambda model, context: "x", "evaluate_every_steps": 1},
        r"Task.evaluate must return a number",
    ),
    "empty": ({"dataset": iter(())}, r"Task.dataset is empty; at least 1 sample is needed"),
    "once": ({"dataset": iter(range(6))}, r"6 samples in epoch 0 and none in epoch 1: its __iter__ must begin anew"),
    "small": ({"dataset": Numbers(3)}, r"effective batch of 4 samples exceeds the 3 samples that Task.dataset has"),
}


@pytest.mark.parametrize("case", FIELDS)
def test_a_wrong_field_is_refused(tmp_path, monkeypatch, case):
    fields, reason = FIELDS[case]
    task = linear(range(8))
    with pytest.raises(RefusedError, match=reason):
        harness.run(
            tmp_path, monkeypatch, task, steps=3, changes=lambda task: [setattr(task, *each) for each in fields.items()]
        )


@pytest.mark.parametrize(
    ("dataset", "where"),
    [
        (failing(), r"Task.dataset, sample 5 of epoch 0 failed: KeyError: 'text'"),
        (Failing([1]), r"Task.dataset\[0\] failed"),
    ],
)
def test_a_failing_dataset_names_the_sample(tmp_path, monkeypatch, dataset, where):
    with pytest.raises(SampleError, match=where) as raised:
        harness.run(tmp_path, monkeypatch, linear(dataset), steps=7, batch={"size": 1})
    assert isinstance(raised.value.__cause__, KeyError)
    assert raised.traceback[-1].path.name == "test_task_refusals.py", "the place in the user's code"


def test_a_stream_that_became_shorter_is_refused(tmp_path, monkeypatch):
    harness.run(tmp_path, monkeypatch, linear(Numbers(6)), steps=1)
    with pytest.raises(RefusedError, match="has 3 samples in epoch 0, but the checkpoint was made after 4"):
        harness.run(tmp_path, monkeypatch, linear(Numbers(3)), steps=2, generation=2)
