"""Runs of a task in the tests' own process, generation after generation."""

import types

import mlx.core as mx
from tests.training import jobs
from tests.training.mlx_lm.mlx_lm_runs import RecordingLink
from tests.training.own_task import feature_task

from mlx_supervisor import wire
from mlx_worker.checkpoint.manifest import load_manifest
from mlx_worker.supervision.stop import StopFlag
from mlx_worker.tasks import python
from mlx_worker.training import loop


class Link(RecordingLink):
    """Also records validations and tests."""

    def __init__(self):
        super().__init__()
        self.validations, self.tests = [], []

    def send(self, kind, **fields):
        kind(run="r", generation=1, seq=0, **fields)  # as the wire has it
        if kind is wire.Validation:
            self.validations.append(types.SimpleNamespace(**fields))
        if kind is wire.Tested:
            self.tests.append(types.SimpleNamespace(**fields))
        super().send(kind, **fields)


def run(folder, monkeypatch, task=None, *, steps, generation=1, args=None, changes=lambda task: None, **job):
    """One generation, up to `steps`. `changes(task)` adapts the feature task; `task` replaces it."""
    folder.mkdir(exist_ok=True)

    def found(job, *more, **options):
        built = task or feature_task.build(7, **(args or {}))
        changes(built)
        python.check(built, "test:build")
        return built

    monkeypatch.setattr(loop, "build_task", found)
    link = Link()
    values = {"run": "r", "run_dir": str(folder), "seed": 7, "steps": steps, "generation": generation}
    made = jobs.job(**values | {"task": {"kind": "python", "base_dir": "", "entry": "test:build"}} | job)
    ending = loop.run(made, link, StopFlag())
    link.weights = ending.weights_sha256
    return link


def checkpoint(folder, step):
    return folder / "checkpoints" / f"step-{step:09d}"


def digests(folder, step):
    """The hash of every file with arrays in a checkpoint."""
    manifest = load_manifest((checkpoint(folder, step) / "MANIFEST.json").read_bytes())
    return {entry.name: entry.sha256 for entry in manifest.files if entry.name.endswith(".safetensors")}


def arrays(folder, step, name):
    return mx.load(str(checkpoint(folder, step) / name))
