"""mlx_lm's own tools accept what a run exports."""

import errno
import os
import sys

import mlx.core as mx
import pytest
from tests.training.mlx_lm.mlx_lm_runs import adapters, run_worker, write

from mlx_worker.checkpoint import durable_files
from mlx_worker.errors import RefusedError
from mlx_worker.training import finishing

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


def test_adapters_are_written_as_soon_as_their_disk_has_room(llama_dir, tmp_path, monkeypatch):
    flush, tries = durable_files.SharedFiles.flush_file, []

    def full_at_first(files, descriptor):
        tries.append(descriptor)
        if 1 < len(tries) <= 3:  # the first is the cache of digests
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        flush(files, descriptor)

    monkeypatch.setattr(durable_files.SharedFiles, "flush_file", full_at_first)
    monkeypatch.setattr(finishing, "FIRST_PAUSE_S", 0.01)
    link = run_worker(llama_dir, write(tmp_path, "late", iters=3), tmp_path / "run")
    calm = run_worker(llama_dir, write(tmp_path, "calm", iters=3), tmp_path / "calm")
    assert [step.step for step in link.steps] == [step.step for step in calm.steps] == [1, 2, 3]
    expected = adapters(tmp_path, "calm")
    assert all(mx.array_equal(array, expected[name]).item() for name, array in adapters(tmp_path, "late").items())
    assert not [path for path in (tmp_path / "adapters-late").iterdir() if ".tmp" in path.name]


def test_an_adapter_path_that_cannot_be_written_is_refused_before_the_first_update(llama_dir, tmp_path):
    (tmp_path / "adapters-blocked").write_text("a file in the way")
    with pytest.raises(RefusedError, match=r"blocked\.yaml: adapter_path: cannot write to .*: it is not a folder"):
        run_worker(llama_dir, write(tmp_path, "blocked", iters=3), tmp_path / "run")
