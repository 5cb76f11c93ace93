"""The lock of a run's folder decides whether a worker may start, whatever the journal says."""

import os
import signal
from pathlib import Path

import psutil
import pytest
from tests.process import harness

RESTART = {"stop_grace_s": 0.5, "term_grace_s": 0.3}


def _lose(journal: Path, how: str) -> None:
    for path in journal.parent.glob("journal.db*"):
        if how == "damaged" and path == journal:
            path.write_bytes(b"garbage " * 1000)
        else:
            path.unlink()


@pytest.mark.parametrize("how", ["deleted", "damaged"])
@pytest.mark.parametrize("state", ["stopped", "deaf"])
def test_one_worker_trains_though_the_journal_is_lost_and_the_old_one_lives(
    tmp_path: Path, how: str, state: str
) -> None:
    args = {"delay_s": 0.01} | ({"mode": "deaf"} if state == "deaf" else {})
    settings = harness.write_settings(tmp_path, args=args, steps=150, restart=RESTART)
    with harness.Foreground(settings) as first:
        first.until("step ")
        worker = psutil.Process(first.process.pid).children()[0]
        if state == "stopped":
            worker.send_signal(signal.SIGSTOP)
        os.kill(first.process.pid, signal.SIGKILL)
        first.process.wait()
        _lose(tmp_path / "state/journal.db", how)
        second = harness.run(settings)
    assert second.summary()["outcome"] == "completed"
    assert not (tmp_path / "overlaps").exists()
    assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE
