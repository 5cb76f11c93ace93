"""Where a run would resume, and what changed since: read from the run's checkpoints, which stay untouched."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_worker.checkpoint import changes, exact_json, training_state
from mlx_worker.checkpoint.manifest import TRAINER, CheckpointError, UnusableError, examine, step_of
from mlx_worker.data import order
from mlx_worker.errors import RefusedError
from mlx_worker.tasks.output_claim import advice
from mlx_worker.training import loop


@dataclass
class Resume:
    """`step`: of the newest checkpoint, 0 without one. `applied`, `refused`: changes since, a sentence each."""

    step: int = 0
    applied: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)


def read(folder: Path, prepared: loop.Prepared) -> Resume:
    """Compare the task with the newest checkpoint in `folder` that has all its files."""
    job, task, plan = prepared
    for step, path in _newest_first(folder):
        try:
            examine(path, job.run, step)
            trainer: Any = exact_json.loads((path / TRAINER).read_bytes())
            old = trainer["recipe"]
        except (UnusableError, CheckpointError, OSError, ValueError, KeyError, TypeError):
            continue  # a start skips it too, and says why
        facts = training_state.recipe(job, task, plan.steps, plan.size, plan.effective)
        try:
            applied = changes.compare(old, facts, step)
            order.keep(old.get("order"), facts["order"], str(path))
            training_state.require_same_arrays(task, path)
            return Resume(step, applied)
        except RefusedError as error:
            return Resume(step, refused=[f"{error} {advice(task.export_dir, job)}".rstrip()])
        except (KeyError, TypeError, ValueError, RuntimeError):
            continue
    return Resume()


def _newest_first(folder: Path) -> list[tuple[int, Path]]:
    try:
        named = [(step_of(path.name), path) for path in folder.iterdir()]
    except OSError:
        return []
    return sorted(((step, path) for step, path in named if step is not None), reverse=True)
