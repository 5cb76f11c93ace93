"""Environment variables that MLX reads once, when it is first used: to be set before it is imported.

What the user has set stays as it is. Metal reads two of these too, and chooses by the chip: there nothing is set.
"""

import os
import sys
from collections.abc import MutableMapping

FASTER = {"MLX_MAX_OPS_PER_BUFFER": "100", "MLX_MAX_MB_PER_BUFFER": "1000"}
"""CUDA: kernels (and MB of their inputs) of one launch. MLX's own figures launch so often that the host, not the GPU,
is the bottleneck of a fine-tune of a small model."""
DETERMINISTIC = {"MLX_CUDA_USE_CUDNN_SDPA": "0"}
"""cuDNN's attention sums gradients in an order that varies from run to run. Without it two runs were equal bit for bit
(LoRA of the shape of Qwen3-0.6B, H100), and a fifth slower."""


def prepare(deterministic: bool, environment: MutableMapping[str, str] = os.environ) -> None:
    """Set what MLX's CUDA backend is to find. Its other backends on Linux read none of it."""
    if sys.platform != "linux":
        return
    for name, value in FASTER.items():
        environment.setdefault(name, value)
    if deterministic:
        environment.update(DETERMINISTIC)
