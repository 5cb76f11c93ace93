"""The lock of a run's folder decides whether a worker may start, whatever the journal says."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import psutil
import pytest
from tests.process import harness

from mlx_supervisor.process import run_lock
from mlx_supervisor.state_dir import StateDir, StateDirError
from mlx_supervisor.wire import EXIT_REFUSED
from mlx_supervisor.wire.run_lock import HeldError, RunLock, is_held, read_holder

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


def test_updates_that_no_supervisor_saw_are_counted_as_replayed(tmp_path: Path) -> None:
    args = {"delay_s": 0.002, "save_every": 10_000, "made": "made"}
    settings = harness.write_settings(tmp_path, args=args, steps=300, restart=RESTART)
    with harness.Foreground(settings) as first:
        first.until("step ")
        worker = psutil.Process(first.process.pid).children()[0]
        harness.eventually(lambda: harness.journaled_steps(tmp_path) > 0)
        first.process.send_signal(signal.SIGSTOP)  # it hears no more
        seen = len((tmp_path / "made").read_text().split())
        harness.eventually(lambda: len((tmp_path / "made").read_text().split()) > seen + 20)
        worker.kill()
        first.process.kill()
        first.process.wait()
        second = harness.run(settings)
    made = (tmp_path / "made").read_text().split()
    assert second.summary()["outcome"] == "completed"
    assert second.summary()["replayed_steps"] == len(made) - len(set(made)) > 20


@pytest.mark.parametrize("deleted", [False, True])
def test_a_start_waits_while_another_process_holds_the_folder(tmp_path: Path, deleted: bool) -> None:
    """Not even SIGKILL would end this one: the test itself. Deleting the file does not free the lock."""
    settings = harness.write_settings(tmp_path, args={}, restart=RESTART)
    folder = tmp_path / "state/runs/run"
    folder.mkdir(parents=True, mode=0o700)
    (tmp_path / "state/runs/run/owner.json").write_text(json.dumps({"settings_file": str(settings.resolve())}))
    lock = RunLock.take(folder)
    if deleted:
        (folder / "worker.lock").unlink()
    with harness.Foreground(settings) as foreground:
        foreground.until("locked by another process")
        assert psutil.Process(foreground.process.pid).children() == []
        lock.close()
        assert foreground.wait() == 0
    assert [each["ended"] for each in foreground.summary()["generations"]] == ["exit code 0"]


def test_a_worker_started_by_hand_is_refused_beside_another(tmp_path: Path) -> None:
    settings = harness.write_settings(tmp_path, args={"delay_s": 0.05}, steps=1000)
    with harness.Foreground(settings) as foreground:
        foreground.until("step ")
        holder = read_holder(tmp_path / "state/runs/run")
        assert holder is not None
        assert holder.pid == psutil.Process(foreground.process.pid).children()[0].pid
        command = [sys.executable, "-m", "mlx_worker", str(tmp_path / "state/runs/run/job.json")]
        second = subprocess.run(command, capture_output=True, text=True, check=False)
    assert second.returncode == EXIT_REFUSED
    assert f"locked by process {holder.pid} (generation 1)" in second.stderr


def test_a_start_that_a_dying_supervisor_did_not_record_is_in_the_summary(tmp_path: Path) -> None:
    settings = harness.write_settings(tmp_path, args={"delay_s": 0.02}, steps=100, restart=RESTART)
    with harness.Foreground(settings) as first:
        first.until("step ")
        harness.interrupt(first)
        assert first.wait() == 130
    journal = tmp_path / "state/journal.db"
    with closing(sqlite3.connect(journal)) as connection, connection:
        history = json.loads(connection.execute("SELECT history FROM runs").fetchone()[0])
        history |= {"generation": 2, "unfinished": True, "outcome": ""}  # saved before the start was
        connection.execute("UPDATE runs SET history = ?", (json.dumps(history),))
    generations = harness.run(settings).summary()["generations"]
    assert [(each["generation"], each["ended"]) for each in generations[1:2]] == [(2, "not started")]
    assert [each["generation"] for each in generations] == [1, 2, 3]


def test_the_kernel_frees_the_lock_and_a_torn_record_names_no_holder(tmp_path: Path) -> None:
    lock = run_lock.take(tmp_path)
    with pytest.raises(HeldError):
        run_lock.take(tmp_path)
    assert is_held(tmp_path)
    lock.record(run_lock.holder(3, "token", os.getpid()))
    (tmp_path / "worker.lock").write_bytes((tmp_path / "worker.lock").read_bytes()[:20])
    assert read_holder(tmp_path) is None
    lock.close()
    assert not is_held(tmp_path)


def test_a_deleted_lock_file_lets_no_second_supervisor_in(tmp_path: Path) -> None:
    first = StateDir(tmp_path / "state")
    (tmp_path / "state/supervisor.lock").unlink()
    with pytest.raises(StateDirError, match="in use by a running supervisor"):
        StateDir(tmp_path / "state")
    first.close()
    StateDir(tmp_path / "state").close()
