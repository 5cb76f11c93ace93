"""What is read and checked before MLX is imported."""

from mlx_supervisor import wire
from mlx_worker.tasks.find_entry import check_entry
from mlx_worker.tasks.mlx_lm.inputs import LoraInputs, read_inputs


def read(job: wire.Job) -> LoraInputs | None:
    """The inputs of an mlx_lm task; None for a python task, whose module is only searched. Raises RefusedError."""
    if job.task.kind == "mlx_lm":
        return read_inputs(job)
    check_entry(job)
    return None
