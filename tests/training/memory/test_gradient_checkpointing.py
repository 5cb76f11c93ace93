"""Gradient checkpointing: the same run in less memory, or with a note why not."""

import mlx.core as mx
import mlx.nn as nn
import pytest
import yaml
from tests.training import toy_task

from mlx_supervisor import wire
from mlx_worker.memory import gradient_checkpointing

ON = {"gradient_checkpointing": True, "limit_bytes": 4 * 2**30}
OFF = {"gradient_checkpointing": False, "limit_bytes": 4 * 2**30}


def layers(supervisor, memory, *, batch=None, **args):
    """Runs of one seed, with evaluations, which must not change the model."""
    args = {"evaluate_every": 2, **args}
    return supervisor.job(entry="layers_task:build", args=args, memory=memory, batch=batch or {"size": 4}, steps=3)


def peak_bytes(worker):
    return max(message.peak_bytes for message in worker.steps)


def reported(worker):
    return worker.ready.gradient_checkpointing, worker.ready.can_checkpoint_gradients


@pytest.fixture(scope="module")
def keeping(session_supervisor):
    """The run that keeps its activations."""
    return session_supervisor.run(layers(session_supervisor, OFF), compiled=True)


def assert_same_run(saving, keeping):
    assert saving.process.returncode == keeping.process.returncode == wire.EXIT_COMPLETED, saving.stderr
    assert [message.loss for message in saving.steps] == [message.loss for message in keeping.steps]
    assert saving.bye.weights_sha256 == keeping.bye.weights_sha256
    lines = [line for line in saving.stdout.splitlines() if line.startswith("validation")]
    assert lines == [line for line in keeping.stdout.splitlines() if line.startswith("validation")]


@pytest.mark.parametrize("how", ["layers", "own", "done"])
def test_the_run_is_the_same_bit_for_bit_in_less_memory(supervisor, keeping, how):
    """Turned on by the worker, by the task's function, or by the task itself."""
    saving = supervisor.run(layers(supervisor, ON, how=how), compiled=True)
    assert_same_run(saving, keeping)
    assert keeping.stdout.count("validation loss") == 3
    assert peak_bytes(saving) < 0.7 * peak_bytes(keeping)
    assert (reported(saving), reported(keeping)) == ((True, True), (False, True))
    assert saving.stdout.count("by hand") == (how == "own")


def test_a_flag_is_no_function(supervisor):
    worker = supervisor.run(layers(supervisor, ON, how="wrong"))
    assert worker.process.returncode == wire.EXIT_REFUSED
    assert "Task.checkpoint_gradients must be a function, found bool" in worker.bye.reason


def test_micro_batches_too(supervisor):
    batch = {"size": 3, "effective": 6}
    keeping, saving = (supervisor.run(layers(supervisor, memory, batch=batch)) for memory in (OFF, ON))
    assert_same_run(saving, keeping)
    assert peak_bytes(saving) < 0.7 * peak_bytes(keeping)


def test_mlx_lm_tasks_too(supervisor, llama_dir):
    values = {"model": "model", "train": True, "data": "text", "batch_size": 4, "iters": 3, "num_layers": 2}
    values |= {"steps_per_eval": 2, "max_seq_length": 64, "lora_parameters": {"rank": 4, "scale": 10.0, "dropout": 0.0}}
    workers = []
    for name, memory, changes in [
        ("keeping", OFF, {}), ("saving", ON, {}), ("both", ON, {"grad_checkpoint": True}),
        ("dropout", OFF, {"grad_checkpoint": True, "lora_parameters": {"rank": 4, "scale": 10.0, "dropout": 0.5}}),
    ]:  # fmt: skip
        path = llama_dir / f"recompute-{name}.yaml"
        path.write_text(yaml.safe_dump(values | {"adapter_path": f"adapters-recompute-{name}"} | changes))
        task = {"kind": "mlx_lm", "base_dir": str(llama_dir), "config": path.name}
        workers.append(supervisor.run(supervisor.job(task=task, memory=memory)))
    keeping, saving, both, dropout = workers
    assert_same_run(saving, keeping)
    assert_same_run(both, keeping)
    assert [reported(worker) for worker in workers] == [(False, True), (True, True), (True, True), (True, True)]
    assert dropout.process.returncode == wire.EXIT_COMPLETED, "as in mlx_lm"
    assert any("grad_checkpoint with lora_parameters.dropout" in note for note in dropout.ready.notes)
    assert not any("grad_checkpoint" in note for worker in workers[:3] for note in worker.ready.notes)


def test_it_stays_off_with_a_note_where_gradients_would_be_wrong(supervisor):
    """Both workers draw the same dropout."""
    plain, requested = (supervisor.run(layers(supervisor, memory, dropout=0.5)) for memory in (OFF, ON))
    assert_same_run(requested, plain)
    assert reported(requested) == reported(plain) == (False, False)
    assert requested.ready.notes == [
        "memory.gradient_checkpointing has no effect: its layers use dropout, which MLX would recompute with different "
        "random numbers"
    ]
    assert plain.ready.notes == []


@pytest.fixture
def block():
    """A layer class that is new for every test."""

    class Block(nn.Module):
        def __init__(self, *inner):
            super().__init__()
            self.inner = list(inner) or [nn.Linear(2, 2)]

        def __call__(self, x):
            for module in self.inner:
                x = module(x)
            return x

    return Block


def task_of(layers, model=None):
    task = toy_task.build(0)
    task.model = nn.Module() if model is None else model
    if layers is not None:
        task.model.layers = layers
    return task


@pytest.mark.parametrize("name", [gradient_checkpointing.MLX_LM_NAME, "another name in mlx_lm's next release"])
def test_it_is_never_done_twice(block, monkeypatch, name):
    """Checkpointing twice would be correct but cost another forward pass."""
    monkeypatch.setattr(gradient_checkpointing, "MLX_LM_NAME", name)
    task, plain = task_of([block(), block()]), block.__call__
    assert not gradient_checkpointing.start(task, requested=False)
    assert block.__call__ is plain
    assert gradient_checkpointing.start(task, requested=True)
    once = block.__call__
    assert once is not plain
    assert gradient_checkpointing.start(task, requested=True)
    assert gradient_checkpointing.start(task, requested=False), "it stays on"
    gradient_checkpointing.checkpoint_layers(task.model)
    assert block.__call__ is once


def test_it_is_not_added_to_the_users_own_checkpointing(block):
    from mlx_lm.tuner.trainer import grad_checkpoint

    task = task_of([block(), block()])
    grad_checkpoint(task.model.layers[0])
    theirs = block.__call__
    assert gradient_checkpointing.start(task, requested=True)
    assert block.__call__ is theirs


def test_which_layers_can_be_checkpointed(block):
    for good in ([block()], (block(), block(nn.Dropout(0.0)))):
        assert gradient_checkpointing.why_not(task_of(good)) == ""
    for bad in (None, [], [nn.Linear(2, 2)], [block(), mx.zeros((1,))], "layers", nn.Linear(2, 2)):
        assert "model.layers must be a list" in gradient_checkpointing.why_not(task_of(bad))
    assert "have the same class" in gradient_checkpointing.why_not(task_of([block()], block()))
    assert "running statistics" in gradient_checkpointing.why_not(task_of([block(), block(nn.BatchNorm(2))]))
    for module in (nn.Dropout(0.1), nn.Dropout2d(0.1), nn.Dropout3d(0.1), nn.Sequential(nn.Dropout(0.1))):
        assert "dropout" in gradient_checkpointing.why_not(task_of([block(), block(module)]))
    own_dropout = type("Own", (nn.Module,), {"__call__": lambda self, x: x * mx.random.bernoulli(0.9, x.shape)})
    assert "dropout" in gradient_checkpointing.why_not(task_of([block(), block(own_dropout())]))
    own = task_of([block(nn.Dropout(0.1))])
    own.checkpoint_gradients = lambda: None
    assert gradient_checkpointing.why_not(own) == "", "the task's own function is trusted"
