"""Everything that an mlx_lm task reads before MLX is imported: a refusal of it takes a fraction of a second."""

from dataclasses import dataclass

from mlx_supervisor import wire
from mlx_worker.errors import RefusedError
from mlx_worker.tasks.mlx_lm.config import LoraConfig, load_config
from mlx_worker.tasks.mlx_lm.jsonl import Lines, read_subsets
from mlx_worker.tasks.mlx_lm.model_folder import model_source
from mlx_worker.tasks.mlx_lm.reports import check_services
from mlx_worker.tasks.output_claim import check_output
from mlx_worker.tasks.safetensors_file import check_safetensors
from mlx_worker.tasks.settings_key import settings_key


@dataclass(frozen=True)
class LoraInputs:
    """`source`: the model's folder, or its name on the hub. `files`: the data by subset; None: from the hub."""

    config: LoraConfig
    source: str
    files: dict[str, Lines] | None


def read_inputs(job: wire.Job) -> LoraInputs:
    """Read and check the configuration, the model's files and the data. Raises RefusedError."""
    config = load_config(job.task.config, job.task.base_dir, job.task.options, job.task.options_from)
    check_services(config)
    if taken := check_output(config.resolve(config.values.adapter_path), job):
        raise config.refuse("adapter_path", taken)
    source = model_source(config)
    _check_adapters(config)
    files = read_subsets(config)
    if files is not None:
        _check_batch(job, config, files["train"])
    return LoraInputs(config, source, files)


def _check_adapters(config: LoraConfig) -> None:
    name = config.values.resume_adapter_file
    if not name:
        return
    path = config.resolve(name)
    if path.is_dir():
        raise config.refuse("resume_adapter_file", f"expected a file such as adapters.safetensors, found {path}")
    if not path.is_file():
        raise config.refuse("resume_adapter_file", f"no such file: {path}")
    problem = check_safetensors(path) if path.suffix == ".safetensors" else ""
    if problem:
        raise config.refuse("resume_adapter_file", f"{path} {problem}")


def _check_batch(job: wire.Job, config: LoraConfig, lines: Lines) -> None:
    values, samples = config.values, len(lines.rows)
    if job.batch.size is None or job.batch.from_task:
        size, accumulation = values.batch_size, values.grad_accumulation_steps
        if size * accumulation > samples:
            key = "batch_size" if "batch_size" in config.given or accumulation == 1 else "grad_accumulation_steps"
            whose = "" if accumulation == 1 else f" (batch_size {size} × grad_accumulation_steps {accumulation})"
            whose = whose if key in config.given else " (mlx_lm's default)"
            text = f"{size * accumulation} samples per update{whose}, but {lines.path} has {samples}"
            raise config.refuse(key, f"{text}; use at most {samples}")
    else:
        effective = job.batch.requested_effective or job.batch.effective or job.batch.size
        if effective > samples:
            text = f"batch.size × batch.accumulation is {effective} samples per update, but {lines.path} has {samples}"
            raise RefusedError(f"{settings_key(job, 'batch')}: {text}; use at most {samples}")
