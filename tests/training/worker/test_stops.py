"""A stop takes effect before any long work begins."""

import pytest

from mlx_supervisor import wire


@pytest.mark.parametrize(("at", "evaluated"), [(0, []), (4, ["step 0"]), (5, ["step 0"])])
def test_no_evaluation_and_no_milestone_begins_after_a_stop_request(supervisor, at, evaluated):
    """Each may take minutes, and the grace period is short: the checkpoint comes first."""
    args = {"at": at, "every": 5}
    worker = supervisor.run(supervisor.job(entry="odd_tasks:stopping", args=args, checkpoint={"every_seconds": 0}))
    assert worker.process.returncode == wire.EXIT_STOPPED, worker.stderr
    phases = worker.of(wire.PhaseChange)
    assert sorted({message.detail for message in phases if message.phase == "eval"}) == evaluated
    assert "cut short" not in worker.stdout
    assert "milestone" not in worker.stdout
    assert worker.bye.step <= at + 1, "at most the update that had begun"
    assert worker.saved_steps == [worker.bye.step] * (at > 0)
