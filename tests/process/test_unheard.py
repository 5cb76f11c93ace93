"""A worker that the supervisor could not hear is judged by what it left on disk."""

import json
import os
import signal
from pathlib import Path

from tests.process import harness

TASK = Path(__file__).parents[1] / "training" / "toy_task.py"


def _settings(folder: Path, steps: int = 60, pause_s: float = 0.02) -> Path:
    (folder / "toy_task.py").write_text(TASK.read_text())
    args = {"samples": 48, "pause_s": pause_s, "dropout": 0.2, "rate": 1e-3}
    tables = {"batch": {"size": 8}, "checkpoint": {"every_steps": 10}}
    return harness.write_settings(folder, args=args, steps=steps, entry="toy_task:build", **tables)


def test_a_worker_that_never_reached_the_supervisor_completes(tmp_path: Path) -> None:
    settings = _settings(tmp_path)
    socket = tmp_path / "state/telemetry.sock"
    with harness.Foreground(settings, trains=True) as foreground:
        harness.eventually((tmp_path / "state/runs/run/job.json").exists)  # it takes longer to connect
        socket.unlink()
        assert foreground.wait() == 0, foreground.stderr
    summary = foreground.summary()
    assert (summary["outcome"], summary["step"], summary["target_steps"]) == ("completed", 60, 60)
    assert summary["weights_sha256"]
    assert summary["loss"] > 0
    [generation] = summary["generations"]
    assert (generation["first_step"], generation["last_step"], generation["cause"]) == (1, 60, "completed")


def test_a_worker_that_finishes_while_the_supervisor_is_stopped_completes(tmp_path: Path) -> None:
    settings = _settings(tmp_path, steps=40)
    last = tmp_path / "state/runs/run/last-message.json"
    with harness.Foreground(settings, trains=True) as foreground:
        foreground.until("Ready")
        os.kill(foreground.process.pid, signal.SIGSTOP)
        harness.eventually(last.exists)
        assert json.loads(last.read_bytes())["message"]["outcome"] == "completed"
        os.kill(foreground.process.pid, signal.SIGCONT)
        assert foreground.wait() == 0, foreground.stderr
    summary = foreground.summary()
    assert (summary["outcome"], summary["step"], len(summary["generations"])) == ("completed", 40, 1)
