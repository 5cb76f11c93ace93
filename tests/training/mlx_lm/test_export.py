"""`python -m mlx_worker.export`: the export of any checkpoint is what the run wrote, or would have written, there."""

import json
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from tests.training import jobs
from tests.training.mlx_lm.mlx_lm_runs import adapters, run_worker, write

from mlx_supervisor import wire
from mlx_worker import export as checkpoint_export
from mlx_worker.errors import RefusedError
from mlx_worker.export import export

CHECKPOINTS = {"checkpoint": {"every_steps": 2, "keep": 10}}


@pytest.fixture(autouse=True)
def _interpreted():
    mx.disable_compile()
    yield
    mx.enable_compile()


def train(llama_dir, folder, ema_decay=None, **changes):
    """A finished run of 6 updates with a checkpoint of every second one; returns its folder."""
    config = write(folder, "worker", save_every=2, **changes)
    run_worker(llama_dir, config, folder / "run", **CHECKPOINTS, ema_decay=ema_decay)
    task = {"kind": "mlx_lm", "base_dir": str(llama_dir), "config": str(config)}
    job = jobs.job(run="worker", run_dir=str(folder / "run"), seed=7, task=task, **CHECKPOINTS)
    (folder / "run" / "job.json").write_bytes(wire.dump_json(job))
    return folder / "run"


def same(folder, other: Path) -> bool:
    mine, expected = mx.load(str(folder / "adapters.safetensors")), mx.load(str(other))
    return mine.keys() == expected.keys() and all(mx.array_equal(mine[name], expected[name]).item() for name in mine)


@pytest.mark.parametrize(("kind", "ema_decay"), [("lora", None), ("full", None), ("lora", 0.7)])
def test_every_checkpoint_is_exported_as_it_was_then(llama_dir, tmp_path, kind, ema_decay):
    from mlx_lm import load

    run_dir = train(llama_dir, tmp_path, ema_decay, fine_tune_type=kind)
    finished = tmp_path / "adapters-worker"
    for step in (2, 4, 6):
        folder = export(run_dir, step, tmp_path / f"e{step}", force=False)
        assert same(folder, finished / f"{step:07d}_adapters.safetensors")
        assert (folder / "adapter_config.json").read_text() == (finished / "adapter_config.json").read_text()
    assert not same(tmp_path / "e2", tmp_path / "e4" / "adapters.safetensors")
    assert same(export(run_dir, None, tmp_path / "newest", force=False), finished / "adapters.safetensors")
    model, _ = load(str(llama_dir / "model"), adapter_path=str(tmp_path / "e2"))
    from mlx.utils import tree_flatten

    loaded, trained = dict(tree_flatten(model.parameters())), mx.load(str(tmp_path / "e2" / "adapters.safetensors"))
    assert all(mx.array_equal(loaded[name], trained[name]).item() for name in trained)


def test_a_checkpoint_that_the_run_deletes_meanwhile_is_replaced_by_another(llama_dir, tmp_path, monkeypatch):
    run_dir = train(llama_dir, tmp_path)
    verify = checkpoint_export.verify

    def deleting(path, run, step):
        verify(path, run, step)
        if step == 6:
            path.rename(path.with_name(f".tmp-{path.name}"))

    monkeypatch.setattr(checkpoint_export, "verify", deleting)
    folder = export(run_dir, None, tmp_path / "newest", force=False)
    assert same(folder, tmp_path / "adapters-worker" / "0000004_adapters.safetensors")


def test_what_was_trained_is_the_checkpoints_whatever_the_file_says_now(llama_dir, tmp_path, capsys):
    run_dir = train(llama_dir, tmp_path)
    before = json.loads((tmp_path / "adapters-worker" / "adapter_config.json").read_text())
    write(tmp_path, "worker", num_layers=1, lora_parameters={"rank": 9, "scale": 1.0, "dropout": 0.0})
    folder = export(run_dir, 4, tmp_path / "changed", force=False)
    found = json.loads((folder / "adapter_config.json").read_text())
    assert [found[key] for key in ("num_layers", "lora_parameters")] == [2, before["lora_parameters"]]
    (tmp_path / "worker.yaml").unlink()
    folder = export(run_dir, 4, tmp_path / "deleted", force=False)
    found = json.loads((folder / "adapter_config.json").read_text())
    assert [found[key] for key in ("num_layers", "lora_parameters")] == [2, before["lora_parameters"]]
    assert "worker.yaml" in capsys.readouterr().err
    (run_dir / "job.json").unlink()
    assert same(export(run_dir, 4, tmp_path / "alone", force=False), folder / "adapters.safetensors")


def test_what_cannot_be_exported(llama_dir, tmp_path, capsys, monkeypatch):
    run_dir = train(llama_dir, tmp_path)
    with pytest.raises(RefusedError, match="no checkpoint of step 3; there are: 2, 4, 6"):
        export(run_dir, 3, tmp_path / "e", force=False)
    with pytest.raises(RefusedError, match="no checkpoint yet"):
        export(tmp_path / "nothing", None, None, force=False)
    assert not (tmp_path / "e").exists()

    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "mine.txt").write_text("mine")
    with pytest.raises(RefusedError, match=r"e is not empty; name another folder with -o, or overwrite with --force"):
        export(run_dir, 2, tmp_path / "e", force=False)
    assert [path.name for path in (tmp_path / "e").iterdir()] == ["mine.txt"]
    export(run_dir, 2, tmp_path / "e", force=True)
    assert (tmp_path / "e" / "mine.txt").read_text() == "mine"

    damaged = run_dir / "checkpoints" / "step-000000006" / "model.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(RefusedError, match=r"step-000000006 is damaged: model.safetensors .* SHA-256"):
        export(run_dir, 6, tmp_path / "six", force=False)
    monkeypatch.chdir(tmp_path)
    assert export(run_dir, None, None, force=False) == tmp_path / "worker-step-4"
    assert "Skipped step-000000006" in capsys.readouterr().err
    assert adapters(tmp_path, "worker")


OWN_TASK = """
import sys
import mlx.core as mx
from mlx.utils import tree_flatten

sys.path.append({tests!r})
import toy_task

def build(seed, own):
    task = toy_task.build(seed)
    task.export = None
    if own:
        task.export = lambda folder: mx.save_safetensors(
            str(folder / "mine.safetensors"), dict(tree_flatten(task.model.trainable_parameters()))
        )
    return task
"""


@pytest.mark.parametrize("own", [True, False])
def test_a_python_task_exports_what_it_writes_at_its_end(supervisor, tmp_path, own):
    """In its own process, as the command starts it."""
    (tmp_path / "own.py").write_text(OWN_TASK.format(tests=str(Path(jobs.__file__).parent)))
    task = {"kind": "python", "base_dir": str(tmp_path), "entry": "own:build", "args": {"own": own}}
    worker = supervisor.run(supervisor.job(task=task, checkpoint={"every_steps": 4, "keep": 10}))
    command = [sys.executable, "-P", "-m", "mlx_worker.export", str(worker.folder), "--step", "8", "--output", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    written = tmp_path / "out" / ("mine.safetensors" if own else "weights.safetensors")
    assert f"Exported step 8 of {worker.job.run} to {tmp_path / 'out'}: {written.name}" in done.stdout
    found = mx.load(str(written))
    saved = mx.load(str(worker.folder / "checkpoints" / "step-000000008" / "model.safetensors"))
    last = mx.load(str(worker.folder / "checkpoints" / "step-000000012" / "model.safetensors"))
    assert found.keys() <= saved.keys()
    assert all(mx.array_equal(found[name], saved[name]).item() for name in found)
    assert not all(mx.array_equal(found[name], last[name]).item() for name in found)
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (again.returncode, "out is not empty" in again.stderr) == (2, True)
