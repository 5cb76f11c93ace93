"""`python -m mlx_worker.export RUN_DIR`: what a run exports at its end, from any of its checkpoints.

For mlx_lm: `adapters.safetensors` and `adapter_config.json`. The model isn't loaded, and the configuration file may
have changed or be missing: the checkpoint says what was trained. For a python task: its own `export`, with the
checkpoint's weights in the model; without one, `weights.safetensors`.
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mlx_supervisor import wire
from mlx_worker.checkpoint import exact_json
from mlx_worker.checkpoint.manifest import (
    AVERAGE,
    CHECKPOINTS,
    MANIFEST,
    MODEL,
    TRAINER,
    CheckpointError,
    UnusableError,
    load_manifest,
    step_of,
    verify,
)
from mlx_worker.errors import RefusedError

ATTEMPTS = 8
"""A run that trains deletes old checkpoints: then the newest is read."""
TRAINED_KEYS = frozenset({"fine_tune_type", "lora_parameters", "num_layers", "mask_prompt", "max_seq_length"})
"""Keys of adapter_config.json that a checkpoint knows and that describe its adapters."""


def main() -> None:
    """Export, and exit: 0 exported, 1 failed, 2 refused."""
    parser = argparse.ArgumentParser(prog="python -m mlx_worker.export", description=__doc__)
    parser.add_argument("run_dir", type=Path, help="the run's folder")
    parser.add_argument("--step", type=int, help="default: the newest")
    parser.add_argument("--output", type=Path, help="default: NAME-step-N in the current folder")
    parser.add_argument("--force", action="store_true", help="write into a folder that is not empty")
    arguments = parser.parse_args()
    try:
        export(arguments.run_dir.absolute(), arguments.step, arguments.output, force=arguments.force)
    except RefusedError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except (OSError, CheckpointError) as error:
        print(f"export failed: {error}", file=sys.stderr)
        sys.exit(1)


def export(run_dir: Path, step: int | None, output: Path | None, *, force: bool) -> Path:
    """Write the export of a verified checkpoint; returns the folder. Raises RefusedError, CheckpointError, OSError."""
    name, step, trained, arrays = _read(run_dir, step)
    folder = (output or Path(f"{name}-step-{step}")).expanduser().absolute()
    _require_free(folder, force=force)
    job = _read_job(run_dir)
    existed = folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        if job is not None and job.task.kind == "python":
            _export_own(job, arrays, folder)
        else:
            _export_adapters(job, trained, arrays, folder)
    except BaseException:
        if not existed:
            with contextlib.suppress(OSError):
                folder.rmdir()  # only if nothing was written
        raise
    print(f"Exported step {step} of {name} to {folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")
    return folder


def _read(run_dir: Path, step: int | None) -> tuple[str, int, dict[str, Any], dict[str, Any]]:
    """The run's name, the step, the fixed facts and the arrays of a checkpoint, which the run may delete meanwhile."""
    import mlx.core as mx

    for attempt in range(1, ATTEMPTS + 1):
        checkpoint, found = _verified(run_dir, step)
        try:
            name = load_manifest((checkpoint / MANIFEST).read_bytes()).run
            trained = exact_json.loads((checkpoint / TRAINER).read_bytes())["recipe"]["fixed"]
            arrays = _arrays(checkpoint)
            mx.eval(arrays)
        except (OSError, RuntimeError) as error:
            if checkpoint.exists() or attempt == ATTEMPTS:
                raise OSError(f"{checkpoint}: {error}") from error
        else:
            return name, found, trained, arrays
    raise AssertionError


def _verified(run_dir: Path, step: int | None) -> tuple[Path, int]:
    """The checkpoint of `step`, or the newest intact one."""
    checkpoints = run_dir / CHECKPOINTS
    found = {found: path for path in _entries(checkpoints) if (found := step_of(path.name)) is not None}
    if not found:
        raise RefusedError(f"{checkpoints}: no checkpoint yet")
    listed = ", ".join(map(str, sorted(found)))
    if step is not None and step not in found:
        raise RefusedError(f"{checkpoints}: no checkpoint of step {step}; there are: {listed}")
    for candidate in sorted(found, reverse=True) if step is None else [step]:
        path = found[candidate]
        if not path.exists():
            continue  # the run deleted it since
        try:
            run = load_manifest((path / MANIFEST).read_bytes()).run
            verify(path, run, candidate)
        except (UnusableError, wire.WireError, FileNotFoundError) as reason:
            if step is not None:
                raise RefusedError(f"{path} is damaged: {reason} Steps with a checkpoint: {listed}") from None
            print(f"Skipped {path.name}: {reason}", file=sys.stderr)
        else:
            return path, candidate
    if not any(path.exists() for path in found.values()):
        raise RefusedError(f"{checkpoints}: the run deleted the checkpoints of steps {listed} meanwhile; try again")
    raise RefusedError(f"{checkpoints}: no intact checkpoint; found the steps {listed}")


def _entries(folder: Path) -> Iterator[Path]:
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        yield from folder.iterdir()


def _require_free(folder: Path, *, force: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise RefusedError(f"{folder} is a file; name a folder with -o")
    if not force and any(_entries(folder)):
        raise RefusedError(f"{folder} is not empty; name another folder with -o, or overwrite with --force")


def _read_job(run_dir: Path) -> wire.Job | None:
    try:
        return wire.load_job((run_dir / "job.json").read_bytes())
    except (OSError, wire.WireError):
        return None


def _arrays(checkpoint: Path) -> dict[str, Any]:
    """The trained arrays by name: averaged ones where the run averages them."""
    import mlx.core as mx

    arrays: Any = mx.load(str(checkpoint / MODEL))
    if (checkpoint / AVERAGE).exists():
        averaged: Any = mx.load(str(checkpoint / AVERAGE))
        arrays |= {name: value.astype(arrays[name].dtype) for name, value in averaged.items()}
        print("The weights are the run's moving average (ema_decay), as at its end.")
    return dict(arrays)


def _export_adapters(job: wire.Job | None, trained: dict[str, Any], arrays: dict[str, Any], folder: Path) -> None:
    from mlx.utils import tree_unflatten

    from mlx_worker.tasks.mlx_lm import task

    model = SimpleNamespace(trainable_parameters=lambda: tree_unflatten(list(arrays.items())))
    task.export(folder, model, _values(job, trained))


def _values(job: wire.Job | None, trained: dict[str, Any]) -> SimpleNamespace:
    """The configuration's values; what was trained is the checkpoint's, whatever the file says now."""
    from mlx_worker.tasks.mlx_lm.config import load_config
    from mlx_worker.tasks.mlx_lm.defaults import config_defaults

    if job is None and trained.get("task.kind") == "python":
        raise RefusedError("job.json is missing in the run's folder: the task's own export cannot be called")
    values = SimpleNamespace(**config_defaults())
    values.train = True
    try:
        if job is None:
            raise RefusedError("job.json is missing in the run's folder")
        given = (job.task.config, job.task.base_dir, job.task.options, job.task.options_from)
        values = load_config(*given).values
    except RefusedError as error:
        values.model = trained.get("model", values.model)
        print(f"note: {error}; other keys of adapter_config.json are mlx_lm's defaults", file=sys.stderr)
    for key in TRAINED_KEYS & trained.keys():
        setattr(values, key, trained[key])
    return values


def _export_own(job: wire.Job, arrays: dict[str, Any], folder: Path) -> None:
    import mlx.core as mx
    from mlx.utils import tree_flatten, tree_unflatten

    from mlx_worker.checkpoint.rng_state import seed_generators
    from mlx_worker.training.loop import build_task

    seed_generators(job.seed)
    task = build_task(job)
    if task.export is None:
        mx.save_safetensors(str(folder / "weights.safetensors"), arrays)
        return
    present: Any = tree_flatten(task.model.parameters())
    missing = set(arrays) - {name for name, _ in present}
    if missing:
        raise RefusedError(f"the task's model has no {', '.join(sorted(missing)[:4])}: did its code change?")
    task.model.update(tree_unflatten(list(arrays.items())))
    mx.eval(task.model.state)
    task.model.eval()
    task.export(folder)


if __name__ == "__main__":
    if not sys.flags.safe_path and sys.path and sys.path[0] in ("", os.getcwd()):  # noqa: PTH109
        del sys.path[0]  # as in mlx_worker itself
    main()
