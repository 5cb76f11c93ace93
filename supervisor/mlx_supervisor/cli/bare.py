"""`mlx-supervisor run --bare`: the same worker without a supervisor, under the same limit, set by rlimit."""

import os
import secrets
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from mlx_supervisor import wire
from mlx_supervisor.cli.request.exit_statuses import EXIT_WRONG_SETTINGS
from mlx_supervisor.cli.request.request import RunRequest
from mlx_supervisor.core.policy import MIB
from mlx_supervisor.host.memory import machine_bytes
from mlx_supervisor.process.launch import write_job
from mlx_supervisor.settings.schema import SettingsError
from mlx_supervisor.settings.to_job import first_spawn
from mlx_supervisor.settings.to_policy import limit_bytes


def run_bare(request: RunRequest, *, fresh: bool = False) -> int:
    """Run in a temporary folder and print how it ended. `fresh`: it may replace another run's results.

    Returns the worker's exit code (2 for a refusal), or 128 + its signal.
    """
    try:
        settings, chosen = request.read()
        settings = replace(settings, bare=True, fresh=secrets.token_hex(8) if fresh else "")
        limit = limit_bytes(settings.runs[chosen], machine_bytes(), f"runs.{chosen}")
    except SettingsError as error:
        print(error, file=sys.stderr)
        return EXIT_WRONG_SETTINGS
    with tempfile.TemporaryDirectory(prefix="mlx-bare-") as folder:
        job_file = write_job(settings, chosen, Path(folder), None, first_spawn(settings.runs[chosen]), limit)
        limit_mib = str(limit // MIB)
        command = [sys.executable, "-P", "-m", "mlx_worker", str(job_file), "--bare", "--data-limit-mib", limit_mib]
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}
        code = subprocess.run(command, env=environment, check=False).returncode
    if code < 0:
        print(f"The unsupervised run was killed by signal {-code}; nothing was saved.")
        return 128 - code
    if code == wire.EXIT_REFUSED:  # the worker has printed why
        return EXIT_WRONG_SETTINGS
    print(f"The unsupervised run ended with exit code {code}.")
    return code
