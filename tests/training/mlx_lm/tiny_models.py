"""Models of a few ten thousand parameters in the architectures that people fine-tune, made on the spot."""

import importlib
import json
from pathlib import Path
from typing import Any

from tests.training import tiny_llama

_SIZE = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 258,
    "rms_norm_eps": 1e-5, "max_position_embeddings": 256, "eos_token_id": 257,
}  # fmt: skip
_ATTENTION = _SIZE | {"intermediate_size": 64, "head_dim": 16, "rope_theta": 10000.0, "tie_word_embeddings": True}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _ATTENTION,
    "qwen3": _ATTENTION,
    "gemma3": {"vocab_size": 258, "eos_token_id": 257, "text_config": _ATTENTION | {
        "model_type": "gemma3_text", "sliding_window": 16, "sliding_window_pattern": 2, "query_pre_attn_scalar": 16,
    }},
    "phi3": _ATTENTION,
    "qwen3_moe": _ATTENTION | {
        "num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1, "mlp_only_layers": [],
        "moe_intermediate_size": 32, "norm_topk_prob": True,
    },
    "mamba2": {
        "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 258, "num_heads": 4, "head_dim": 16,
        "intermediate_size": 64, "state_size": 16, "layer_norm_epsilon": 1e-5, "conv_kernel": 4, "n_groups": 1,
        "use_bias": False, "use_conv_bias": True, "tie_word_embeddings": True, "time_step_limit": [0.001, 0.1],
        "time_step_rank": "auto", "eos_token_id": 257,
    },
    "falcon_h1": _ATTENTION | {
        "mamba_d_ssm": 32, "mamba_d_head": 16, "mamba_n_heads": 2, "mamba_d_state": 16, "mamba_n_groups": 1,
        "mamba_chunk_size": 16,
    },
    "gpt_oss": _ATTENTION | {
        "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}  # fmt: skip
"""By mlx_lm's model type."""


def make(folder: Path, kind: str, *, bits: int | None = None) -> None:
    """A model folder as mlx_lm loads it; with `bits`, quantized in groups of 32 (as for QLoRA)."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.utils import quantize_model

    config = {"model_type": kind} | CONFIGS[kind]
    module = importlib.import_module(f"mlx_lm.models.{kind}")
    mx.random.seed(1)
    model = module.Model(module.ModelArgs.from_dict(config))
    if bits is not None:
        model, config = quantize_model(model, config, group_size=32, bits=bits)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(
        str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())), metadata={"format": "mlx"}
    )
    tiny_llama.write_tokenizer(folder)
