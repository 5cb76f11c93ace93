"""A drill may leak more than one MLX array can hold on the devices that index with 32 bits."""

import mlx.core as mx
import pytest

from mlx_supervisor import wire
from mlx_worker.training import drills

MIB = 2**20
LARGEST_DIMENSION = 2**31 - 1
"""MLX's shapes are 32-bit integers."""


@pytest.mark.parametrize(("job", "size_mib"), [
    (wire.DrillJob(leak_mib_per_step=2500.0), 2500),
    (wire.DrillJob(allocate_mib=40 * 1024, allocate_at_step=1), 40 * 1024),
    (wire.DrillJob(leak_mib_per_step=0.5), 0.5),
])  # fmt: skip
def test_a_drill_of_any_size_is_allocated_whole(monkeypatch, job, size_mib):
    made = []

    def full(shape, value, dtype):
        assert all(size <= LARGEST_DIMENSION for size in shape), "MLX raises: the shape does not fit 32 bits"
        made.append(shape[0])
        return mx.array(value, dtype)

    monkeypatch.setattr(drills.mx, "full", full)
    drills.Drills(job, generation=1).within_update(1)
    assert sum(made) == size_mib * MIB


def test_mlx_refuses_what_one_array_can_not_hold():
    with pytest.raises((ValueError, TypeError, OverflowError)):
        mx.full((2500 * MIB,), 1, dtype=mx.uint8)
