"""What MLX finds in its environment when it is first used."""

from mlx_worker.training import determinism


def test_a_deterministic_run_overrides_the_environment() -> None:
    environment = {"MLX_CUDA_USE_CUDNN_SDPA": "1", "MLX_MAX_OPS_PER_BUFFER": "7"}
    determinism.prepare(deterministic=True, environment=environment)
    assert environment == {"MLX_CUDA_USE_CUDNN_SDPA": "0", "MLX_MAX_OPS_PER_BUFFER": "7"}


def test_any_other_run_is() -> None:
    environment = {"MLX_CUDA_USE_CUDNN_SDPA": "1"}
    determinism.prepare(deterministic=False, environment=environment)
    assert environment == {"MLX_CUDA_USE_CUDNN_SDPA": "1"}
