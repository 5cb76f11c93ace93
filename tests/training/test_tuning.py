"""What MLX finds in its environment when it is first used."""

import sys

import pytest

from mlx_worker import tuning


@pytest.fixture
def on_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")


@pytest.mark.usefixtures("on_linux")
def test_what_the_user_has_set_stays() -> None:
    environment = {"MLX_MAX_OPS_PER_BUFFER": "7"}
    tuning.prepare(deterministic=False, environment=environment)
    assert environment == {**tuning.FASTER, "MLX_MAX_OPS_PER_BUFFER": "7"}


@pytest.mark.usefixtures("on_linux")
def test_a_deterministic_run_is_not_left_to_the_environment() -> None:
    environment = {"MLX_CUDA_USE_CUDNN_SDPA": "1"}
    tuning.prepare(deterministic=True, environment=environment)
    assert environment["MLX_CUDA_USE_CUDNN_SDPA"] == "0"


def test_metal_chooses_by_the_chip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    environment: dict[str, str] = {}
    tuning.prepare(deterministic=True, environment=environment)
    assert environment == {}
