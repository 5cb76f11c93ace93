"""`mlx-supervisor export`: the adapters of any checkpoint, written by the worker's Python, which has MLX."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from mlx_supervisor.cli.offline import places, runs

MODULE = "mlx_worker.export"


def export(words: Sequence[str], state_dir: Path | None, *, step: int | None, output: Path | None, force: bool) -> int:
    """Export a checkpoint of a run; the newest without `step`. Returns the exit status."""
    given = places.find(words, state_dir)
    run = runs.one(given.places, given.names)
    command = [sys.executable, "-P", "-m", MODULE, str(run.folder)]
    command += [] if step is None else [f"--step={step}"]
    command += [] if output is None else [f"--output={output}"]
    sys.stdout.flush()
    code = subprocess.run(command + ["--force"] * force, check=False).returncode
    return code if code in (0, 2) else 1
