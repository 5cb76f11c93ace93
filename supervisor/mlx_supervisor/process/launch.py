"""How a worker is started: its command line and its job file."""

import os
import shlex
import shutil
import sys
from contextlib import suppress
from pathlib import Path

from mlx_supervisor import wire
from mlx_supervisor.core import actions as act
from mlx_supervisor.settings.schema import Settings
from mlx_supervisor.settings.to_job import Past, job_of

WORKER_VARIABLE = "MLX_SUPERVISOR_WORKER"
"""Environment variable with another worker's command line, for tests and benches; the job's path is appended."""


def worker_command() -> list[str]:
    """The worker's command line, without the job."""
    replaced = os.environ.get(WORKER_VARIABLE)
    return shlex.split(replaced) if replaced else [sys.executable, "-P", "-m", "mlx_worker"]


def write_job(
    settings: Settings,
    run: str,
    folder: Path,
    telemetry: str | None,
    spawn: act.Spawn,
    memory_limit_bytes: int,
    past: Past | None = None,
) -> Path:
    """Write `job.json` into the run's folder atomically, readable by its owner only. Raises OSError.

    `telemetry`: the address for reports; None: a bare run.
    """
    job = job_of(settings, run, folder, telemetry, spawn, memory_limit_bytes, past)
    path = folder / "job.json"
    temporary = path.with_suffix(".tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(wire.dump_json(job))
    temporary.replace(path)
    return path


def keep_job(folder: Path) -> None:
    """Copy `job.json` to `accepted-job.json`: a worker is ready with it. A later job may be refused."""
    with suppress(OSError):  # only `compare` reads it
        temporary = folder / "accepted-job.tmp"
        shutil.copy(folder / "job.json", temporary)
        temporary.replace(folder / "accepted-job.json")
