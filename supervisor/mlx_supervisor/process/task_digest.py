"""What a completed run was trained with: equal at the next start, nothing is left to train, and no worker is needed."""

import hashlib
from pathlib import Path

import msgspec

from mlx_supervisor.settings.paths import resolve
from mlx_supervisor.settings.schema import Settings

FILE_LIMIT_BYTES = 16 * 2**20


def task_digest(settings: Settings, name: str) -> str:
    """SHA-256 of what decides the run's training: the settings' task, seed and batch, and the task's own file.

    That is the configuration file, or the Python module of the entry, if it is a file beside the settings. "" when the
    file is not found: then only a worker can tell. Of `steps` it counts only whether it is given.
    """
    run = settings.runs[name]
    file = _file(settings, name)
    content = b""
    if file is not None:
        try:
            with file.open("rb") as opened:
                content = opened.read(FILE_LIMIT_BYTES + 1)
        except OSError:
            return ""
        if len(content) > FILE_LIMIT_BYTES:
            return ""
    elif run.task.kind == "python":
        return ""
    batch = [run.batch.size, run.batch.accumulation, run.batch.preserve_effective]
    facts = [run.task, run.seed, run.steps is None, run.deterministic, batch, hashlib.sha256(content).hexdigest()]
    return hashlib.sha256(msgspec.json.encode(facts, enc_hook=str)).hexdigest()


def _file(settings: Settings, name: str) -> Path | None:
    task = settings.runs[name].task
    if task.config is not None:
        return resolve(task.config, settings.base_dir)
    if task.entry is None:
        return None
    module = settings.base_dir.joinpath(*task.entry.partition(":")[0].split("."))
    candidates = (module.with_name(f"{module.name}.py"), module / "__init__.py")
    return next((path for path in candidates if path.is_file()), None)
