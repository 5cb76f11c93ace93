"""The settings `max_grad_norm` and `ema_decay` with an mlx_lm configuration file."""

import mlx.core as mx
import numpy as np
from tests.training.mlx_lm import mlx_lm_runs


def test_gradients_are_clipped_and_the_adapters_are_the_averaged_ones(llama_dir, tmp_path):
    config = mlx_lm_runs.write(llama_dir, "averaged")
    link = mlx_lm_runs.run_worker(llama_dir, config, tmp_path / "run", max_grad_norm=0.5, ema_decay=0.9)
    assert all(step.metrics["grad_norm"] > 0 for step in link.steps)
    exported = mx.load(str(llama_dir / "adapters-averaged" / "adapters.safetensors"))
    folder = tmp_path / "run" / "checkpoints" / "step-000000006"
    averaged, last = (mx.load(str(folder / name)) for name in ("ema.safetensors", "model.safetensors"))
    assert exported.keys() == averaged.keys() == last.keys()
    assert all(np.array_equal(np.array(exported[name]), np.array(averaged[name])) for name in exported)
    assert any(not np.array_equal(np.array(exported[name]), np.array(last[name])) for name in exported)
