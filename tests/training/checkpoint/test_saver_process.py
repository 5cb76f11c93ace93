"""A worker that is stopped, killed or broken in the middle of a write."""

import signal
import time

import pytest

from mlx_supervisor import wire
from mlx_worker.checkpoint.store import CheckpointStore

SLOW = {"entry": "slow_disk:build", "args": {"flush_s": 0.15, "pause_s": 0.01}}
FAST = {"entry": "slow_disk:build", "args": {"flush_s": 0.0}}
OFTEN = {"every_seconds": 0.05, "keep": 2}
STEPS = 100


@pytest.fixture(scope="session")
def calm_weights(session_supervisor):
    worker = session_supervisor.run(session_supervisor.job("calm-writes", steps=STEPS))
    return worker.bye.weights_sha256


def until_writing(worker):
    """Wait until one checkpoint exists and the next is being written."""
    worker.until(wire.Checkpoint)
    deadline_s = time.monotonic() + 30
    while not list((worker.folder / "checkpoints").glob(".tmp-step-*/*.safetensors")):
        assert time.monotonic() < deadline_s
        assert worker.process.poll() is None, worker.stderr
        worker.supervisor.receive(0.01)


def test_training_continues_while_a_checkpoint_is_written(supervisor):
    worker = supervisor.start(supervisor.job("slow", steps=STEPS, checkpoint=OFTEN, **SLOW))
    saved = worker.until(wire.Checkpoint)
    worker.send(wire.Stop)
    worker.wait()
    during = [step for step in worker.steps if step.seq < saved.seq and step.step > saved.step]
    assert len(during) > 10, "updates were made between the snapshot and its end"
    assert saved.seconds > 0.6
    assert saved.stall_s < 0.2 * saved.seconds
    assert not [m for m in worker.of(wire.PhaseChange) if m.seq < saved.seq and m.phase == "checkpoint"]


def test_a_stop_waits_for_the_write_and_saves_the_last_state(supervisor, calm_weights):
    first = supervisor.start(supervisor.job("stopped", steps=STEPS, checkpoint=OFTEN, **SLOW))
    until_writing(first)
    first.signal(signal.SIGTERM)
    assert first.wait() == wire.EXIT_STOPPED, first.stderr
    assert all(message.ok for message in first.of(wire.Checkpoint))
    assert first.saved_steps[-1] == first.bye.step == first.of(wire.Checkpoint)[-1].step
    assert len(first.saved_steps) == 2
    second = supervisor.run(supervisor.job("stopped", steps=STEPS, generation=2, **FAST))
    assert second.ready.step == first.bye.step
    assert second.bye.weights_sha256 == calm_weights


def test_a_kill_in_the_middle_of_a_write_costs_only_that_write(supervisor, calm_weights):
    first = supervisor.start(supervisor.job("killed-writing", steps=STEPS, checkpoint=OFTEN, **SLOW))
    until_writing(first)
    acknowledged = first.of(wire.Checkpoint)[-1].step
    first.signal(signal.SIGKILL)
    first.wait()
    found = CheckpointStore(first.folder / "checkpoints", "killed-writing", 2).load_newest()
    assert found is not None
    assert found.step >= acknowledged
    assert list((first.folder / "checkpoints").glob(".tmp-*")) == [], "the incomplete checkpoint is deleted"
    second = supervisor.run(supervisor.job("killed-writing", steps=STEPS, generation=2, **FAST))
    assert second.ready.step == found.step
    assert second.bye.weights_sha256 == calm_weights


def test_code_that_crashes_beside_a_write_lets_it_end(supervisor):
    drill = {"crash_at_step": 4}
    worker = supervisor.run(
        supervisor.job("crash", checkpoint={"every_seconds": 0, "every_steps": 3}, drill=drill, **SLOW)
    )
    assert worker.process.returncode == wire.EXIT_FAILED
    assert worker.bye.reason == "DrillError: drill: crash at step 4"
    assert worker.saved_steps == [3]
    assert [(message.step, message.ok) for message in worker.of(wire.Checkpoint)] == [(3, True)]


def test_the_best_by_validation_loss_is_kept(supervisor):
    """The toy's validation loss goes up and down, as real ones do."""
    checkpoint = {"every_seconds": 0, "every_steps": 5, "keep": 1, "keep_best": True}
    job = {"args": {"evaluate_every": 2, "rate": 0.05}, "checkpoint": checkpoint, "steps": 40}
    worker = supervisor.run(supervisor.job("best", **job))
    assert worker.process.returncode == wire.EXIT_COMPLETED, worker.stderr
    found = [line.split() for line in worker.stdout.splitlines() if line.startswith("validation loss")]
    losses = {int(words[-1]): float(words[2]) for words in found if words[-1] != "0"}
    best = min(losses, key=lambda step: losses[step])
    assert best < 40
    assert worker.saved_steps == [best, 40]
