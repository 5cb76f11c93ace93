"""The same configuration file, seed and order of samples: mlx_lm.lora and the worker give the same numbers."""

import json

import mlx.core as mx
import numpy as np
import pytest
from tests.training.mlx_lm.mlx_lm_runs import adapters, run_mlx_lm, run_worker, write

SCHEDULE = {"name": "cosine_decay", "arguments": [1e-3, 6], "warmup": 2, "warmup_init": 1e-4}
DROPOUT = {"rank": 4, "scale": 10.0, "dropout": 0.3}
OPTIMIZERS = {
    "adam": {"betas": [0.8, 0.99]}, "adamw": {"weight_decay": 0.1}, "muon": {"momentum": 0.9}, "sgd": {"momentum": 0.5},
    "adafactor": {"relative_step": False, "scale_parameter": False},
}  # fmt: skip


@pytest.fixture
def interpreted():
    """Without mx.compile, which is faster for six updates."""
    mx.disable_compile()
    yield
    mx.enable_compile()


def both(llama_dir, folder, monkeypatch, **changes):
    link = run_worker(llama_dir, write(folder, "worker", **changes), folder / "run")
    return link, run_mlx_lm(llama_dir, write(folder, "mlx_lm", **changes), monkeypatch)


def assert_same_bits(link, reported, folder, updates=6):
    assert link.losses == reported.losses
    assert len(set(link.losses)) == updates, "nothing was learnt"
    assert [step.learning_rate for step in link.steps] == reported.rates
    assert np.cumsum([step.tokens for step in link.steps]).tolist() == reported.tokens
    mine, expected = adapters(folder, "worker"), adapters(folder, "mlx_lm")
    assert mine.keys() == expected.keys()
    assert all(mx.array_equal(mine[name], expected[name]).item() for name in expected)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
def test_losses_rates_and_adapters_are_mlx_lms_bit_for_bit(llama_dir, tmp_path, monkeypatch, kind, optimizer):
    """Three kinds times five optimizers; dropout, schedule, layers and data take turns."""
    turn = ["lora", "dora", "full"].index(kind) + list(OPTIMIZERS).index(optimizer)
    changes = {
        "fine_tune_type": kind, "optimizer": optimizer, "optimizer_config": {optimizer: OPTIMIZERS[optimizer]},
        "lora_parameters": DROPOUT | ({} if turn % 2 else {"dropout": 0.0}), "num_layers": 1 + turn % 2,
        "lr_schedule": SCHEDULE if turn % 3 else None,
        "data": ["chat", "completions", "text"][turn % 3], "mask_prompt": turn % 3 != 2,
    }  # fmt: skip
    assert_same_bits(*both(llama_dir, tmp_path, monkeypatch, **changes), tmp_path)


def test_compiled_too(llama_dir, tmp_path, monkeypatch):
    changes = {"lora_parameters": DROPOUT, "optimizer": "adamw", "iters": 3}
    assert_same_bits(*both(llama_dir, tmp_path, monkeypatch, **changes), tmp_path, updates=3)


@pytest.mark.usefixtures("interpreted")
def test_with_gradient_checkpointing(llama_dir, tmp_path, monkeypatch):
    from mlx_lm.models.llama import TransformerBlock

    changes = {"grad_checkpoint": True, "lora_parameters": DROPOUT}
    plain = TransformerBlock.__call__
    monkeypatch.setattr(TransformerBlock, "__call__", plain)  # mlx_lm replaces it for good
    link = run_worker(llama_dir, write(tmp_path, "worker", **changes), tmp_path / "run")
    assert TransformerBlock.__call__ is not plain
    monkeypatch.setattr(TransformerBlock, "__call__", plain)
    reported = run_mlx_lm(llama_dir, write(tmp_path, "mlx_lm", **changes), monkeypatch)
    assert_same_bits(link, reported, tmp_path)


@pytest.mark.usefixtures("interpreted")
def test_validation_losses(llama_dir, tmp_path, monkeypatch):
    """The worker validates after an update, mlx_lm before the next one, with batches in another order."""
    link, reported = both(llama_dir, tmp_path, monkeypatch, val_batches=-1, steps_per_eval=1)
    words = [detail.split() for detail in link.details if detail.startswith("validation")]
    found = {int(word[-1]): float(word[2]) for word in words}
    assert found.keys() == {*reported.valid, 6}
    assert [found[step] for step in reported.valid] == pytest.approx(list(reported.valid.values()), abs=6e-5)
    assert found[6] < found[0] - 1


def distance(mine, expected):
    """The distance between two runs' adapters, relative to how far one of them moved."""
    moved = [name for name in expected if name.endswith("lora_b")]  # these began at zero
    apart = sum(float(mx.square(mine[name] - expected[name]).sum().item()) for name in moved)
    return (apart / sum(float(mx.square(expected[name]).sum().item()) for name in moved)) ** 0.5


@pytest.mark.usefixtures("interpreted")
def test_accumulation_is_mlx_lms_where_micro_batches_weigh_the_same(llama_dir, tmp_path, monkeypatch):
    data = tmp_path / "even"
    data.mkdir()
    for name in ("train", "valid"):
        lines = [json.dumps({"text": f"{i:03d} even {i * i:05d}"}) for i in range(24)]
        (data / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    changes = {"data": str(data), "mask_prompt": False, "grad_accumulation_steps": 3, "lora_parameters": DROPOUT}
    changes |= {"optimizer": "sgd", "learning_rate": 0.03, "iters": 12}
    link, reported = both(llama_dir, tmp_path, monkeypatch, **changes)
    means = np.array(reported.losses).reshape(4, 3).mean(axis=1)
    assert link.losses == pytest.approx(means.tolist(), abs=1e-6)
    assert link.losses[-1] < link.losses[0] - 0.01
    assert distance(adapters(tmp_path, "worker"), adapters(tmp_path, "mlx_lm")) < 1e-5


@pytest.mark.usefixtures("interpreted")
def test_accumulation_of_ragged_samples_is_the_whole_batch_here_and_not_in_mlx_lm(llama_dir, tmp_path, monkeypatch):
    """mlx_lm averages micro-batches as if each had as many tokens."""
    sgd = {"optimizer": "sgd", "learning_rate": 0.03}
    split = sgd | {"batch_size": 4, "grad_accumulation_steps": 6, "iters": 24}
    link, _ = both(llama_dir, tmp_path, monkeypatch, **split)
    reported = run_mlx_lm(llama_dir, write(tmp_path, "whole", **sgd, batch_size=24, iters=4), monkeypatch)
    whole = adapters(tmp_path, "whole")
    assert link.losses == pytest.approx(reported.losses, abs=1e-5)
    assert distance(adapters(tmp_path, "worker"), whole) < 1e-4
    assert distance(adapters(tmp_path, "mlx_lm"), whole) > 0.1


COMPATIBLE = {"batch_size": 4, "grad_accumulation_steps": 3, "iters": 12}


def compatible(llama_dir, folder, name, size, **changes):
    """A run that accumulates as mlx_lm does, with micro-batches of `size` samples."""
    config = write(folder, name, **COMPATIBLE | changes)
    batch = {"size": size, "effective": 12, "requested_size": 4, "requested_effective": 12}
    return run_worker(llama_dir, config, folder / f"run-{name}", task={"mlx_lm_compatible": True}, batch=batch)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_accumulation_as_in_mlx_lm_if_requested(llama_dir, tmp_path, monkeypatch, optimizer):
    """Ragged samples, dropout: the bits of mlx_lm's adapters. Smaller micro-batches give the same training."""
    changes = {"optimizer": optimizer, "learning_rate": 1e-2, "lora_parameters": DROPOUT}
    link = compatible(llama_dir, tmp_path, "worker", 4, **changes)
    reported = run_mlx_lm(llama_dir, write(tmp_path, "mlx_lm", **COMPATIBLE | changes), monkeypatch)
    means = np.array(reported.losses).reshape(4, 3).mean(axis=1)
    assert link.losses == pytest.approx(means.tolist(), abs=1e-6)
    assert [step.tokens for step in link.steps] == np.diff([0, *reported.tokens[2::3]]).tolist()
    mine, expected = adapters(tmp_path, "worker"), adapters(tmp_path, "mlx_lm")
    assert all(mx.array_equal(mine[name], expected[name]).item() for name in expected)


@pytest.mark.usefixtures("interpreted")
def test_half_the_micro_batch_is_the_same_training_also_then(llama_dir, tmp_path, monkeypatch):
    changes = {"optimizer": "sgd", "learning_rate": 0.03}
    losses = [compatible(llama_dir, tmp_path, f"size{size}", size, **changes).losses for size in (4, 2, 3)]
    weighted, _ = both(llama_dir, tmp_path, monkeypatch, **COMPATIBLE | changes)
    whole = adapters(tmp_path, "size4")
    for number, size in enumerate((2, 3), 1):
        assert losses[number] == pytest.approx(losses[0], abs=1e-5)
        assert distance(adapters(tmp_path, f"size{size}"), whole) < 1e-5
    assert distance(adapters(tmp_path, "worker"), whole) > 0.05, "the samples must be ragged enough to tell"
    assert weighted.losses != pytest.approx(losses[0], abs=1e-3)
