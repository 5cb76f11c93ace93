"""Environment variables that MLX reads once, at first use: set them before it is imported."""

import os
from collections.abc import MutableMapping

DETERMINISTIC = {"MLX_CUDA_USE_CUDNN_SDPA": "0"}
"""cuDNN's attention sums gradients in an order that varies from run to run. Without it, repeated runs were bit for bit
equal, and so were killed and resumed runs (LoRA of the shape of Qwen3-0.6B, H100, MLX 0.32.4)."""


def prepare(deterministic: bool, environment: MutableMapping[str, str] = os.environ) -> None:
    """Set the variables for MLX's CUDA backend; its other backends ignore them."""
    if deterministic:
        environment.update(DETERMINISTIC)
