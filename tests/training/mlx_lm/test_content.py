"""What a run of mlx_lm was trained on is identified by content, and changed options are said or refused at a resume."""

import json
import shutil

import pytest
from tests.training.mlx_lm import mlx_lm_runs

from mlx_worker.errors import RefusedError

ADOPTED = {"size": 4, "effective": 4, "requested_size": 4, "requested_effective": 4, "from_task": True}
"""The batch of a later generation whose settings leave it to the YAML file."""


@pytest.fixture(scope="module")
def trained(llama_dir, tmp_path_factory):
    """A folder with its own model and data, and a run of 2 updates."""
    folder = tmp_path_factory.mktemp("content")
    for name in ("model", "chat"):
        shutil.copytree(llama_dir / name, folder / name)
    mlx_lm_runs.run_worker(folder, mlx_lm_runs.write(folder, "run", iters=2, grad_accumulation_steps=1), folder / "run")
    return folder


def resume(trained, tmp_path, change=lambda folder: None, **options):
    """The notes of a resume from a copy of the run, after `change` to the files and `options` in the YAML file."""
    folder = tmp_path / "copy"
    shutil.copytree(trained, folder)
    change(folder)
    config = mlx_lm_runs.write(folder, "run", **{"iters": 3, "adapter_path": str(trained / "adapters-run")} | options)
    return mlx_lm_runs.run_worker(folder, config, folder / "run", generation=2, batch=ADOPTED)


def other_weights(folder):
    path = folder / "model/model.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(bytes(data))


def other_tokenizer(folder):
    path = folder / "model/tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": 77}))


def fewer_samples(folder):
    path = folder / "chat/train.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:20]))


def renamed(folder):
    (folder / "model").rename(folder / "base")
    (folder / "chat").rename(folder / "talk")


def test_nothing_changed_but_the_target(trained, tmp_path):
    assert resume(trained, tmp_path).notes == ["Target raised: 2 → 3 steps."]


def test_the_same_content_in_renamed_folders_is_the_same(trained, tmp_path):
    assert resume(trained, tmp_path, renamed, model="base", data="talk").notes == ["Target raised: 2 → 3 steps."]


@pytest.mark.parametrize(("change", "sentence"), [
    (other_weights, "The base model's weights differ from this run's. Put them back, or begin anew with --fresh."),
    (other_tokenizer,
     "The tokenizer differs from this run's (tokenizer_config.json). Put it back, or begin anew with --fresh."),
    (fewer_samples,
     "The training data differ from this run's (24 samples before, 20 now). "
     "Put them back, or begin anew with --fresh."),
])  # fmt: skip
def test_other_content_under_the_same_path_is_refused(trained, tmp_path, change, sentence):
    with pytest.raises(RefusedError) as refused:
        resume(trained, tmp_path, change)
    assert str(refused.value).startswith(f"{sentence} --fresh moves the adapters in ")


@pytest.mark.parametrize(("options", "sentence"), [
    ({"lora_parameters": {"rank": 8, "scale": 10.0, "dropout": 0.0}}, "lora_parameters.rank differs from this run's"),
    ({"optimizer": "sgd"}, "The optimizer differs from this run's (Adam before, SGD now)."),
    ({"num_layers": 1}, "num_layers differs from this run's (2 before, 1 now)."),
    ({"max_seq_length": 32}, "max_seq_length differs from this run's (64 before, 32 now)."),
])  # fmt: skip
def test_another_kind_of_training_is_refused(trained, tmp_path, options, sentence):
    with pytest.raises(RefusedError) as refused:
        resume(trained, tmp_path, **options)
    assert str(refused.value).startswith(sentence)
    assert "Put it back, or begin anew with --fresh. --fresh moves the adapters in " in str(refused.value)


@pytest.mark.parametrize(("options", "sentence"), [
    ({"learning_rate": 5e-4}, "Learning rate changed: 0.001 → 0.0005, from step 3."),
    ({"batch_size": 8}, "Batch changed: 4 × 1 → 8 × 1 (micro-batch × accumulation), from step 3."),
    ({"optimizer_config": {"adam": {"eps": 1e-6}}}, "optimizer_config.eps changed: none → 1e-06, from step 3."),
])  # fmt: skip
def test_an_applied_change_is_said(trained, tmp_path, options, sentence):
    link = resume(trained, tmp_path, **options)
    assert link.notes == ["Target raised: 2 → 3 steps.", sentence]
    step = link.steps[0]
    assert (step.step, step.batch_size) == (3, options.get("batch_size", 4))
    assert step.learning_rate == pytest.approx(options.get("learning_rate", 1e-3))
