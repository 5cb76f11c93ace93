"""Environment variables that MLX reads once, when it is first used: to be set before it is imported."""

import os
from collections.abc import MutableMapping

DETERMINISTIC = {"MLX_CUDA_USE_CUDNN_SDPA": "0"}
"""cuDNN's attention sums gradients in an order that varies from run to run. Without it, runs were equal bit for bit,
and a run killed and resumed equal to a whole one (LoRA of the shape of Qwen3-0.6B, H100, MLX 0.32.4)."""


def prepare(deterministic: bool, environment: MutableMapping[str, str] = os.environ) -> None:
    """Set what MLX's CUDA backend is to find; its other backends read none of it."""
    if deterministic:
        environment.update(DETERMINISTIC)
