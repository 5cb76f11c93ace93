"""Whether the module of a python task's `entry` exists, found out without running it."""

import importlib.util
import sys
from importlib.machinery import PathFinder
from pathlib import Path

from mlx_supervisor import wire
from mlx_worker.errors import RefusedError
from mlx_worker.tasks.settings_key import settings_key
from mlx_worker.tasks.suggest import did_you_mean


def check_entry(job: wire.Job) -> None:
    """Check the form of `package.module:function`, and that the package or module exists. Raises RefusedError."""
    entry, base_dir, key = job.task.entry or "", job.task.base_dir, settings_key(job, "task.entry")
    module, colon, path = entry.partition(":")
    if not (module and colon and path):
        raise RefusedError(f'{key}: expected "package.module:function", found {entry!r:.200}')
    name = module.partition(".")[0]
    try:
        missing = (
            name not in sys.modules
            and PathFinder.find_spec(name, [base_dir, *sys.path]) is None
            and importlib.util.find_spec(name) is None
        )
    except (ImportError, ValueError):
        return  # importing it will say why
    if missing:
        near = did_you_mean(name, sorted(file.stem for file in Path(base_dir).glob("*.py")))
        raise RefusedError(f"{key}: cannot import {module} from {base_dir}: no file {name}.py there{near}")
