"""Tiny models of several architectures with a byte-level tokenizer, made on the spot for mlx_lm."""

import importlib
import json
import random
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.training import tiny_llama

VOCABULARY = 4096
"""Large for a tiny model, so that logits make memory grow visibly with the batch size."""
LENGTH = 256

_COMMON = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": VOCABULARY, "eos_token_id": 257}
_ATTENTION = {"intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "tie_word_embeddings": True, **_COMMON, **_ATTENTION},
    "qwen3": {
        "model_type": "qwen3", "head_dim": 16, "max_position_embeddings": 1024, "rope_theta": 10000.0,
        "tie_word_embeddings": True, **_COMMON, **_ATTENTION,
    },
    "gemma3": {"model_type": "gemma3_text", "head_dim": 16, "sliding_window": 64, **_COMMON, **_ATTENTION},
    "mamba2": {
        "model_type": "mamba2", "num_heads": 8, "head_dim": 16, "state_size": 16, "conv_kernel": 4, "expand": 2,
        "n_groups": 1, "use_bias": False, "use_conv_bias": True, "layer_norm_epsilon": 1e-5, "time_step_rank": "auto",
        "time_step_limit": [0.0, 1e9], "time_step_min": 0.001, "time_step_max": 0.1, "tie_word_embeddings": True,
        "chunk_size": 64, "intermediate_size": 128, **_COMMON,
    },
}  # fmt: skip


def make_model(folder: Path, architecture: str) -> None:
    """Configuration, random weights and tokenizer."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    configuration = CONFIGURATIONS[architecture]
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(configuration))
    module = importlib.import_module(f"mlx_lm.models.{configuration['model_type']}")
    mx.random.seed(1)
    model = module.Model(module.ModelArgs.from_dict(configuration))
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    tiny_llama.write_tokenizer(folder)


def make_data(folder: Path, *, train: int, valid: int, shortest: int = LENGTH - 30) -> None:
    """Samples of `shortest` to `LENGTH` tokens."""
    rng = random.Random(1)
    folder.mkdir(parents=True)
    for name, count in (("train", train), ("valid", valid)):
        texts = ["".join(rng.choices("abcdefgh ", k=rng.randint(shortest, LENGTH - 2))) for _ in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
