"""One configuration file run by mlx_lm.lora and by the worker, both in the tests' own process."""

import json
import types
from pathlib import Path

import mlx.core as mx
import numpy as np
import yaml
from tests.training import jobs

from mlx_supervisor import wire

BASE = {
    "model": "model", "train": True, "data": "chat", "mask_prompt": True, "seed": 7, "batch_size": 4, "iters": 6,
    "num_layers": 2, "learning_rate": 1e-3, "steps_per_eval": 100, "steps_per_report": 1, "val_batches": 0,
    "max_seq_length": 64, "lora_parameters": {"rank": 4, "scale": 10.0, "dropout": 0.0},
}  # fmt: skip


class RecordingLink:
    """A double of the worker's link: records its messages, sends no commands."""

    dropped = last_step = 0
    last_loss = None
    current_phase = "load"

    def __init__(self):
        self.steps, self.details, self.notes = [], [], []

    def send(self, kind, **fields):
        if kind is wire.Step:
            self.steps.append(types.SimpleNamespace(**fields))
        elif kind is wire.PhaseChange:
            self.details.append(fields["detail"])
        elif kind is wire.Ready:
            self.notes += fields["notes"]

    def phase(self, name, detail="", waiting_for=""):
        self.current_phase = name
        self.send(wire.PhaseChange, phase=name, detail=detail, waiting_for=waiting_for)

    def receive(self):
        return []

    @property
    def losses(self):
        return [step.loss for step in self.steps]


def write(folder, name, **changes):
    """`NAME.yaml`, whose adapters go to `adapters-NAME` beside it."""
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(BASE | {"adapter_path": str(folder / f"adapters-{name}")} | changes))
    return path


def run_worker(llama_dir, config, run_dir, **job):
    """The loop as the worker runs it, with no process around it. May raise RefusedError."""
    from mlx_worker.supervision.stop import StopFlag
    from mlx_worker.training import loop

    link = RecordingLink()
    run_dir.mkdir(exist_ok=True)
    task = {"kind": "mlx_lm", "base_dir": str(llama_dir), "config": str(config)} | job.pop("task", {})
    ending = loop.run(jobs.job(run="worker", run_dir=str(run_dir), seed=7, task=task, **job), link, StopFlag())
    assert ending.completed
    return link


def run_mlx_lm(llama_dir, config, monkeypatch):
    """Run `mlx_lm.lora --config` with the worker's order of batches; returns its reports."""
    from mlx_lm import lora
    from mlx_lm.tuner import trainer
    from mlx_lm.tuner.callbacks import TrainingCallback

    arguments = lora.CONFIG_DEFAULTS | yaml.safe_load(config.read_text())
    arguments |= {name: str(llama_dir / arguments[name]) for name in ("model", "data")}
    reported = types.SimpleNamespace(losses=[], valid={}, rates=[], tokens=[])
    sizes = sizes_of(Path(arguments["data"]) / "train.jsonl")
    accumulation = arguments["grad_accumulation_steps"]

    def batches(dataset, batch_size, max_seq_length, loop=False, **_options):
        if loop:
            yield from in_worker_order(dataset, sizes, batch_size, accumulation, max_seq_length)
        else:
            yield from trainer.iterate_batches(dataset, batch_size, max_seq_length)

    class Listener(TrainingCallback):
        def on_train_loss_report(self, info):
            reported.losses.append(info["train_loss"])
            reported.rates.append(info["learning_rate"])
            reported.tokens.append(info["trained_tokens"])

        def on_val_loss_report(self, info):
            reported.valid[info["iteration"]] = info["val_loss"]

    def train(**options):
        trainer.train(**options | {"iterate_batches": batches, "training_callback": Listener()})

    monkeypatch.setattr(lora, "train", train)
    lora.run(types.SimpleNamespace(**arguments))
    return reported


def sizes_of(path):
    """The bytes of text in every line."""

    def count(value):
        if isinstance(value, str):
            return len(value.encode())
        return sum(map(count, value.values() if isinstance(value, dict) else value))

    return np.array([count(json.loads(line)) for line in path.read_text().splitlines()])


def in_worker_order(dataset, sizes, batch_size, accumulation, max_seq_length):
    """Micro-batches as the worker's loop cuts them, padded by mlx_lm."""
    from mlx_lm.tuner.trainer import iterate_batches

    from mlx_worker.data.batches import EffectiveBatches
    from mlx_worker.data.order import Grouping

    effective = batch_size * accumulation
    stream = EffectiveBatches(len(dataset), 7, grouping=Grouping(sizes, effective))
    while True:
        ids = stream.next(effective)
        for start in range(0, effective, batch_size):
            chosen = [dataset[i] for i in ids[start : start + batch_size]]
            yield next(iterate_batches(chosen, batch_size, max_seq_length))


def adapters(folder, name):
    """The exported tensors by name."""
    return mx.load(str(folder / f"adapters-{name}" / "adapters.safetensors"))
