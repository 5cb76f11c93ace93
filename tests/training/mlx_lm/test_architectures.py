"""Every architecture and option: trained, killed twice, resumed with equal bits, and fused by mlx_lm's own tool."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.process import harness
from tests.training.mlx_lm import tiny_models
from tests.training.test_supervised import worker_of

STEPS = 40
KILLED_AFTER = (5, 20)
"""A checkpoint of at least this step exists when the worker is killed."""
BASE = {
    "model": "model", "data": "data", "adapter_path": "adapters", "train": True, "seed": 7, "batch_size": 4,
    "iters": STEPS, "num_layers": 2, "learning_rate": 1e-3, "steps_per_eval": 15, "val_batches": 2,
    "max_seq_length": 64, "lora_parameters": {"rank": 4, "scale": 10.0, "dropout": 0.1},
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    **{kind: {"architecture": kind} for kind in tiny_models.CONFIGS},
    "QLoRA": {"bits": 4},
    "DoRA": {"fine_tune_type": "dora"},
    "full": {"fine_tune_type": "full"},
    "Muon": {"fine_tune_type": "full", "optimizer": "muon"},
    "mask_prompt": {"mask_prompt": True, "grad_accumulation_steps": 2, "batch_size": 2, "iters": 2 * STEPS},
    "hf_dataset": {"hf_dataset": {"path": "rows", "train_split": "train[:90%]", "valid_split": "train[-10%:]"}},
}  # fmt: skip
LINES = [
    {
        "messages": [
            {"role": "user", "content": f"q{i}" * 4},
            {"role": "assistant", "content": f"a{i % 7} " * (i % 9 + 1)},
        ]
    }
    for i in range(60)
]
DATASETS_PACKAGE = """\
import json, pathlib, re

class Rows(list):
    @property
    def features(self):
        return list(self[0])

    column_names = features

def load_dataset(path, name=None, split=None, **options):
    rows = [json.loads(line) for line in open(pathlib.Path(__file__).with_name("rows.jsonl"))]
    start, end = re.fullmatch(r"train\\[(-?\\d+%)?:(-?\\d+%)?\\]", split).groups()
    at = lambda text: len(rows) * int(text[:-1]) // 100
    return Rows(rows[at(start) if start else None : at(end) if end else None])
"""
"""What mlx_lm uses of the package `datasets`, whose own data sets are all on a hub."""


def _write_packages(folder: Path) -> None:
    (folder / "datasets").mkdir(parents=True)
    (folder / "datasets/__init__.py").write_text(DATASETS_PACKAGE)
    (folder / "datasets/rows.jsonl").write_text(_json_lines())


def _json_lines() -> str:
    return "".join(json.dumps(line) + "\n" for line in LINES)


def _project(folder: Path, changes: dict[str, Any]) -> Path:
    """A folder as a user has it: a model, data, mlx_lm's configuration file and the settings."""
    changes = dict(changes)
    tiny_models.make(folder / "model", changes.pop("architecture", "llama"), bits=changes.pop("bits", None))
    (folder / "data").mkdir()
    for name in ("train", "valid"):
        (folder / "data" / f"{name}.jsonl").write_text(_json_lines())
    (folder / "lora.yaml").write_text(yaml.safe_dump(BASE | changes))
    settings = folder / "settings.toml"
    settings.write_text(
        'state_dir = "state"\n[runs.run]\nseed = 7\n'
        '[runs.run.task]\nkind = "mlx_lm"\nconfig = "lora.yaml"\n'
        "[runs.run.checkpoint]\nevery_steps = 5\n[runs.run.restart]\nbackoff_s = 0.01\n"
    )
    return settings


def _train(settings: Path, kills: tuple[int, ...]) -> dict[str, Any]:
    """The summary of a run whose worker is killed once for each entry of `kills`."""
    with harness.Foreground(settings, trains=True) as foreground:
        for step in kills:
            harness.eventually(lambda step=step: _saved(settings.parent) >= step, lambda: foreground.stderr)  # type: ignore[misc]
            worker = worker_of(foreground)
            assert worker is not None, foreground.stderr
            worker.send_signal(signal.SIGKILL)
        assert foreground.process.wait(240) == 0, foreground.stderr
        return foreground.summary()


def _saved(folder: Path) -> int:
    return max((int(path.name[5:]) for path in folder.glob("state/runs/run/checkpoints/step-*")), default=0)


def _logits(model_dir: Path, adapter_dir: Path | None = None) -> Any:
    import mlx.core as mx
    from mlx_lm import load

    model, tokenizer = load(str(model_dir), adapter_path=None if adapter_dir is None else str(adapter_dir))[:2]
    return model(mx.array([tokenizer.encode("q7q7q7")]))[0].astype(mx.float32)


@pytest.mark.long
@pytest.mark.parametrize("case", CASES)
def test_trained_killed_resumed_and_fused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    import mlx.core as mx

    _write_packages(tmp_path / "packages")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"), prepend=os.pathsep)
    calm, wild = tmp_path / "calm", tmp_path / "wild"
    undisturbed = _train(_project(calm, CASES[case]), ())
    killed = _train(_project(wild, CASES[case]), KILLED_AFTER)
    causes = [generation["cause"] for generation in killed["generations"]]
    assert causes == ["killed externally", "killed externally", "completed"]
    assert undisturbed["step"] == killed["step"] == STEPS
    assert killed["weights_sha256"] == undisturbed["weights_sha256"]
    assert killed["loss"] == undisturbed["loss"]
    adapters = [(folder / "adapters/adapters.safetensors").read_bytes() for folder in (calm, wild)]
    assert adapters[0] == adapters[1]

    fused = [sys.executable, "-m", "mlx_lm", "fuse", "--model", str(wild / "model")]
    fused += ["--save-path", str(wild / "fused")]
    dequantized = ["--dequantize"] if "bits" in CASES[case] else []  # else merging rounds to 4 bits again
    done = subprocess.run(
        [*fused, "--adapter-path", str(wild / "adapters"), *dequantized], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    before, trained = _logits(wild / "model"), _logits(wild / "model", wild / "adapters")
    assert not mx.allclose(before, trained, atol=1e-2).item()
    assert mx.allclose(_logits(wild / "fused"), trained, rtol=1e-2, atol=1e-2).item()
