"""`run --bare` gives the worker the job that the settings request."""

import subprocess
from pathlib import Path

import pytest
from tests.process import harness

from mlx_supervisor import wire
from mlx_supervisor.cli.bare import run_bare
from mlx_supervisor.cli.request.request import RunRequest


@pytest.mark.parametrize(("setting", "recomputes"), [("always", True), ("last_resort", False)])
def test_a_bare_run_has_the_settings_batch_and_gradient_checkpointing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str, recomputes: bool
) -> None:
    jobs = []

    def started(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        jobs.append(wire.load_job(Path(command[4]).read_bytes()))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", started)
    batch, memory = {"size": 4, "accumulation": 2}, {"gradient_checkpointing": setting}
    assert run_bare(RunRequest(harness.write_settings(tmp_path, args={}, batch=batch, memory=memory))) == 0
    (job,) = jobs
    assert (job.batch.size, job.batch.effective, job.memory.gradient_checkpointing) == (4, 8, recomputes)
