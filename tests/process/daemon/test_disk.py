"""A disk that refuses what the supervisor writes delays a run, and ends none."""

import asyncio
import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from tests.process import harness

from mlx_supervisor.core import events as ev
from mlx_supervisor.core.machine.states import State
from mlx_supervisor.daemon import summary
from mlx_supervisor.daemon.daemon import Daemon
from mlx_supervisor.process import launch
from mlx_supervisor.settings.reader import read_settings
from mlx_supervisor.state_dir import StateDir

FAILURES = 6
"""More than `restart.max_without_progress` allows in a row."""


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.ESTALE, errno.ENODEV, errno.EACCES])
def test_a_start_waits_until_its_job_file_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    monkeypatch.setenv(launch.WORKER_VARIABLE, harness.environment()[launch.WORKER_VARIABLE])
    read = read_settings(harness.write_settings(tmp_path, args={}))
    failures = [0]

    def refuse(*arguments: Any) -> Path:
        failures[0] += 1
        if failures[0] <= FAILURES:
            raise OSError(code, os.strerror(code))
        return launch.write_job(*arguments)

    monkeypatch.setattr("mlx_supervisor.daemon.worker_process.write_job", refuse)
    observer = harness.NoticeList()

    async def scenario() -> None:
        daemon = Daemon(read, StateDir(read.state_dir), [observer])
        await daemon.open()
        try:
            run = daemon.runs["run"]
            run.command(ev.CommandKind.START)
            await asyncio.wait_for(run.until(lambda: run.at_rest), harness.PATIENCE_S)
            assert run.machine.state is State.COMPLETED
        finally:
            await daemon.close()

    asyncio.run(scenario())
    assert observer.kinds.count("spawn_failed") == FAILURES
    assert any(os.strerror(code) in notice.text for notice in observer.notices)


def test_a_summary_that_the_disk_refused_is_written_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(summary, "FIRST_PAUSE_S", 0.0)
    synced, failing = os.fsync, [True]

    def sync(descriptor: int) -> None:
        if failing[0]:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        synced(descriptor)

    monkeypatch.setattr(os, "fsync", sync)
    file = summary.SummaryFile(tmp_path)
    with pytest.raises(OSError, match="Read-only"):
        file.write({"outcome": "completed"})
    file.retry()
    assert list(tmp_path.iterdir()) == [], "nothing half-written is left"
    failing[0] = False
    file.retry(last=True)
    assert json.loads((tmp_path / "summary.json").read_text()) == {"outcome": "completed"}
