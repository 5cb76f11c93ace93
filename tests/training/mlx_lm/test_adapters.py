"""mlx_lm's own tools accept what a run exports."""

import sys

import mlx.core as mx
import pytest
from tests.training.mlx_lm.mlx_lm_runs import adapters, run_worker, write

PROMPT = "q7q7"


@pytest.fixture(autouse=True)
def _interpreted():
    mx.disable_compile()
    yield
    mx.enable_compile()


def command(monkeypatch, *arguments):
    """`python -m mlx_lm ...` in this process: importing it again would take longer than everything else."""
    from mlx_lm import cli

    monkeypatch.setattr(sys, "argv", ["mlx_lm", *arguments])
    cli.main()


def logits(model, tokenizer):
    return model(mx.array([tokenizer.encode(PROMPT)]))[0, -1]


@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
def test_loaded_fused_and_generated_with(llama_dir, tmp_path, monkeypatch, capsys, kind):
    from mlx_lm import generate, load
    from mlx_lm.tuner.utils import load_adapters

    base = str(llama_dir / "model")
    changes = {
        "fine_tune_type": kind,
        "learning_rate": 3e-2,
        "lora_parameters": {"rank": 4, "scale": 10.0, "dropout": 0.1},
    }
    run_worker(llama_dir, write(tmp_path, "worker", **changes), tmp_path / "run")
    folder = str(tmp_path / "adapters-worker")

    plain, tokenizer = load(base)
    before = logits(plain, tokenizer)
    model = load_adapters(plain, folder)
    model.eval()
    from mlx.utils import tree_flatten

    loaded, trained = dict(tree_flatten(model.parameters())), adapters(tmp_path, "worker")
    assert all(mx.array_equal(loaded[name], trained[name]).item() for name in trained)
    expected = logits(model, tokenizer)
    assert not mx.allclose(before, expected, atol=0.1).item()
    text = generate(model, tokenizer, PROMPT, max_tokens=6)
    assert text.strip()

    options = [
        "--adapter-path",
        folder,
        "--max-tokens",
        "6",
        "--prompt",
        PROMPT,
        "--ignore-chat-template",
        "--temp",
        "0",
    ]
    capsys.readouterr()
    command(monkeypatch, "generate", "--model", base, *options, "--verbose", "False")
    assert text in capsys.readouterr().out

    fused = str(tmp_path / "fused")
    command(monkeypatch, "fuse", "--model", base, "--adapter-path", folder, "--save-path", fused)
    found = logits(*load(fused))
    assert mx.allclose(found, expected, atol=1e-4).item()
