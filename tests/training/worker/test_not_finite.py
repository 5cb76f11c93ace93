"""A loss that is NaN or infinite ends the worker at once: further updates would be useless."""

import math

import pytest

from mlx_supervisor import wire

EVERY_3 = {"every_seconds": 0, "every_steps": 3}


def spoiled(supervisor, *, checkpoint=EVERY_3, args=None, **fields):
    return supervisor.job(entry="odd_tasks:spoiled", args=args, checkpoint=checkpoint, **fields)


@pytest.mark.parametrize("spoil", ["nan", "inf"])
@pytest.mark.parametrize(("at", "saved"), [(6, [3]), (7, [3, 6]), (12, [3, 6, 9])])
def test_a_loss_that_is_not_finite_ends_the_worker_without_a_checkpoint(supervisor, at, saved, spoil):
    """Also where a checkpoint is due, and in the last update."""
    worker = supervisor.run(spoiled(supervisor, args={"at": at, "spoil": spoil}))
    assert worker.process.returncode == wire.EXIT_NOT_FINITE, worker.stderr
    assert [message.step for message in worker.steps] == list(range(1, at + 1)), "the one that had begun is dropped"
    assert not math.isfinite(worker.steps[-1].loss)
    before, last = worker.steps[-2:]
    found = {"nan": "NaN", "inf": "infinite"}[spoil]
    text = f"loss became {found} at step {at} (previous loss {before.loss:.6g}; learning rate {last.learning_rate:.6g})"
    assert (worker.bye.outcome, worker.bye.reason, worker.bye.step) == ("failed", text, at)
    assert worker.stderr == f"failed: {text}\n"
    assert worker.saved_steps == saved
    assert all(message.ok for message in worker.of(wire.Checkpoint)), "no checkpoint was attempted"


def test_the_first_update_has_no_previous_loss(supervisor):
    worker = supervisor.run(spoiled(supervisor, args={"at": 1}))
    assert worker.process.returncode == wire.EXIT_NOT_FINITE
    assert worker.bye.reason == "loss became NaN at step 1 (no previous step; learning rate 0.01)"
    assert worker.saved_steps == []


def test_a_running_write_completes_first(supervisor):
    worker = supervisor.run(spoiled(supervisor, args={"at": 4, "flush_s": 0.15}))
    assert worker.process.returncode == wire.EXIT_NOT_FINITE, worker.stderr
    assert [(message.step, message.ok) for message in worker.of(wire.Checkpoint)] == [(3, True)]
    assert worker.saved_steps == [3]
    assert worker.bye.step == 4


def test_the_next_generation_resumes_from_the_last_good_state(supervisor):
    calm = supervisor.run(spoiled(supervisor, args={"at": 0}))
    first = supervisor.run(spoiled(supervisor, name="twice", args={"at": 7}))
    assert first.process.returncode == wire.EXIT_NOT_FINITE
    second = supervisor.run(spoiled(supervisor, name="twice", args={"at": 0}, generation=2))
    assert second.ready.step == 6
    assert second.bye.weights_sha256 == calm.bye.weights_sha256


def test_without_stop_on_not_finite_the_run_continues(supervisor):
    worker = supervisor.run(spoiled(supervisor, args={"at": 7, "spoil": "nan reported"}, stop_on_not_finite=False))
    assert worker.process.returncode == wire.EXIT_COMPLETED, worker.stderr
    assert [message.step for message in worker.steps if not math.isfinite(message.loss)] == [7]
    assert worker.saved_steps == [6, 9, 12]


def test_an_update_without_a_token_to_learn_has_no_loss_and_ends_nothing(supervisor):
    worker = supervisor.run(supervisor.job(entry="odd_tasks:masked", args={"at": 7}, checkpoint=EVERY_3))
    assert worker.process.returncode == wire.EXIT_COMPLETED, worker.stderr
    assert [message.step for message in worker.steps if message.loss is None] == [7]
    assert all(message.loss is None or math.isfinite(message.loss) for message in worker.steps)
    last = supervisor.run(supervisor.job(name="last", entry="odd_tasks:masked", args={"at": 12}, checkpoint=EVERY_3))
    assert last.bye.loss == last.steps[-2].loss, "the newest known"
