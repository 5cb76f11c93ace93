"""An interrupted run ends with the same weights as an uninterrupted one."""

import json
import re
import signal

import pytest

from mlx_supervisor import wire
from mlx_worker.checkpoint.manifest import FileEntry, load_manifest

ARGS = {"norm": True, "evaluate_every": 5}
"""Dropout, running statistics, a schedule, and an evaluation that draws random numbers: all must be restored."""
EVERY = {"every_seconds": 0, "every_steps": 3}
LOGGED = {"size": 8, "sample_log": True}


@pytest.fixture(scope="session")
def undisturbed(session_supervisor):
    worker = session_supervisor.run(session_supervisor.job("undisturbed", args=ARGS, batch=LOGGED, checkpoint=EVERY))
    assert worker.process.returncode == wire.EXIT_COMPLETED, worker.stderr
    return worker


def losses(*workers):
    return {message.step: message.loss for worker in workers for message in worker.steps}


def test_happy_path(undisturbed):
    messages = undisturbed.messages
    assert [type(message) for message in messages[:3]] == [wire.Hello, wire.PhaseChange, wire.Ready]
    assert messages[0].token.startswith("token of the tests ")
    assert messages[0].pid == undisturbed.process.pid
    assert (undisturbed.ready.step, undisturbed.ready.target_steps) == (0, 12)
    assert (undisturbed.ready.batch_size, undisturbed.ready.effective_batch) == (8, 8)
    assert [message.seq for message in messages] == list(range(len(messages)))
    assert [message.step for message in undisturbed.steps] == list(range(1, 13))
    assert losses(undisturbed)[12] < losses(undisturbed)[1]
    assert [(message.step, message.ok) for message in undisturbed.of(wire.Checkpoint)] == [
        (step, True) for step in (3, 6, 9, 12)
    ]
    assert isinstance(messages[-1], wire.Bye)
    assert (messages[-1].outcome, messages[-1].step) == ("completed", 12)
    assert messages[-1].loss == losses(undisturbed)[12]
    assert undisturbed.saved_steps == [6, 9, 12]
    assert (undisturbed.folder / "export" / "done.txt").exists()
    assert undisturbed.stdout.splitlines()[-1].startswith("completed: step=12 steps=12 seconds=")
    assert undisturbed.stderr == ""


def test_step_reports_what_was_measured(undisturbed):
    first, last = undisturbed.steps[0], undisturbed.steps[-1]
    assert (first.samples, first.batch_size, first.accumulation) == (8, 8, 1)
    assert first.learning_rate > last.learning_rate > 0
    assert first.peak_bytes >= first.active_bytes > 0
    assert first.resident_bytes > 2**20
    assert last.dropped == 0


def test_samples_are_each_epochs_permutation(undisturbed):
    ids = [i for line in undisturbed.samples for i in line["samples"]]
    assert sorted(ids[:48]) == list(range(48))
    assert sorted(ids[48:96]) == list(range(48))
    assert ids[:48] != ids[48:96]
    assert [line["epoch"] for line in undisturbed.samples] == [0] * 6 + [1] * 6


def test_evaluation_leaves_no_trace(supervisor, undisturbed):
    assert len(undisturbed.stdout.split("validation loss")) == 5, "at 0, 5, 10, and 12"
    plain = supervisor.run(supervisor.job(args=ARGS | {"evaluate_every": 0}))
    assert plain.bye.weights_sha256 == undisturbed.bye.weights_sha256


@pytest.mark.parametrize("how", ["message", "sigterm", "sigint", "lifeline"])
def test_stop_and_resume_is_bit_equal(supervisor, undisturbed, how):
    first = supervisor.start(supervisor.job("stopped", args=ARGS | {"pause_s": 0.2}, batch=LOGGED))
    first.until(wire.Ready)
    first.until(wire.Step, lambda message: message.step == 2)
    actions = {
        "message": lambda: first.send(wire.Stop, reason="enough"),
        "sigterm": lambda: first.signal(signal.SIGTERM),
        "sigint": lambda: first.signal(signal.SIGINT),
        "lifeline": first.sever,
    }
    actions[how]()
    assert first.wait() == wire.EXIT_STOPPED, first.stderr
    reasons = {"message": "enough", "sigterm": "SIGTERM", "sigint": "SIGINT", "lifeline": "the supervisor died"}
    assert (first.bye.outcome, first.bye.reason) == ("stopped", reasons[how])
    assert first.saved_steps == [first.bye.step]
    assert 2 <= first.bye.step < 12, "the run was over before the stop"

    second = supervisor.run(supervisor.job("stopped", args=ARGS, batch=LOGGED, generation=2))
    assert second.ready.checkpoint == f"step-{first.bye.step:09d}"
    assert second.ready.step == first.bye.step
    assert losses(first, second) == losses(undisturbed)
    assert second.bye.weights_sha256 == undisturbed.bye.weights_sha256
    assert [line["samples"] for line in second.samples] == [line["samples"] for line in undisturbed.samples]


def test_killed_in_the_middle_is_bit_equal(supervisor, undisturbed):
    hang = {"hang_at_step": 8, "generations": [1]}
    first = supervisor.start(supervisor.job("killed", args=ARGS, batch=LOGGED, checkpoint=EVERY, drill=hang))
    first.until(wire.Step, lambda message: message.step == 7)
    first.until_saved(6)
    first.signal(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    second = supervisor.run(
        supervisor.job("killed", args=ARGS, batch=LOGGED, checkpoint=EVERY, drill=hang, generation=2)
    )
    assert (second.ready.step, second.ready.notes) == (6, []), "nothing was changed"
    assert losses(first, second) == losses(undisturbed)
    assert second.bye.weights_sha256 == undisturbed.bye.weights_sha256
    validations = [re.findall("validation loss .* at step 12", worker.stdout) for worker in (undisturbed, second)]
    assert len(validations[0]) == 1
    assert validations[0] == validations[1], "running statistics count in evaluation only"
    reported = [worker.of(wire.Validation)[-1] for worker in (undisturbed, second)]
    assert (reported[0].step, reported[0].loss) == (reported[1].step, reported[1].loss)
    by_step = {line["step"]: line["samples"] for line in second.samples}
    assert list(by_step.values()) == [line["samples"] for line in undisturbed.samples]


def test_compiled_steps_resume_bit_equal(supervisor):
    args = ARGS | {"weighted": True}
    whole = supervisor.run(supervisor.job(args=args, steps=6), compiled=True)
    job = {"args": args, "steps": 6, "drill": {"crash_at_step": 4, "generations": [1]}}
    checkpoint = {"every_seconds": 0, "every_steps": 1}
    first = supervisor.run(supervisor.job("compiled", checkpoint=checkpoint, **job), compiled=True)
    assert first.process.returncode == wire.EXIT_FAILED
    second = supervisor.run(supervisor.job("compiled", checkpoint=checkpoint, generation=2, **job), compiled=True)
    assert second.ready.step == 3
    assert whole.bye.weights_sha256 is not None
    assert second.bye.weights_sha256 == whole.bye.weights_sha256


@pytest.mark.parametrize("weighted", [False, True])
def test_halved_batch_keeps_the_loss_curve(supervisor, weighted):
    """Sample 3 has no weight: where it is alone in a micro-batch, its mean would be NaN."""
    args = {"weighted": weighted, "dropout": 0.0}
    whole = supervisor.run(supervisor.job(args=args, batch={"size": 8, "sample_log": True}))
    split = supervisor.run(supervisor.job(args=args, batch={"size": 3, "effective": 8, "sample_log": True}))
    single = supervisor.run(supervisor.job(args=args, batch={"size": 1, "effective": 8, "sample_log": True}))
    for other, size, accumulation in ((split, 3, 3), (single, 1, 8)):
        assert {(m.batch_size, m.accumulation, m.samples) for m in other.steps} == {(size, accumulation, 8)}
        assert other.samples == whole.samples
        for step, loss in losses(whole).items():
            assert losses(other)[step] == pytest.approx(loss, abs=1e-4)
    assert losses(whole)[12] != pytest.approx(losses(whole)[1], abs=1e-2), "nothing was learnt"


@pytest.mark.parametrize("size", [1, 2])
def test_an_update_without_any_weight_changes_nothing(supervisor, size):
    """Every token is masked: there is no loss, and the weights stay finite."""
    args = {"samples": 2, "weighted": True, "weightless": True, "optimizer": "SGD"}
    worker = supervisor.run(supervisor.job(args=args, steps=3, batch={"size": size, "effective": 2}))
    assert worker.process.returncode == wire.EXIT_COMPLETED, worker.stderr
    assert worker.steps[-1].loss is None
    assert (worker.steps[-1].tokens, worker.steps[-1].accumulation) == (0, 2 // size)


def test_resize_at_the_next_update(supervisor):
    job = supervisor.job(args={"dropout": 0.0}, steps=500, batch={"size": 8, "sample_log": True})
    worker = supervisor.start(job)
    worker.until(wire.Step)
    worker.send(wire.Resize, batch_size=4, effective_batch=8)
    halved = worker.until(wire.Step, lambda message: message.batch_size == 4)
    assert (halved.accumulation, halved.samples) == (2, 8)
    worker.send(wire.Resize, batch_size=4, effective_batch=4)
    smaller = worker.until(wire.Step, lambda message: message.samples == 4)
    assert smaller.accumulation == 1
    worker.send(wire.Resize, batch_size=64, effective_batch=64)  # more than the dataset has: ignored
    worker.until(wire.Step, lambda message: message.step > smaller.step + 20)
    worker.send(wire.Stop)
    assert worker.wait() == wire.EXIT_STOPPED
    assert worker.steps[-1].samples == 4
    ids = [i for line in worker.samples for i in line["samples"]]
    assert all(sorted(ids[start : start + 48]) == list(range(48)) for start in range(0, len(ids) - 47, 48))


def test_finished_run_completes_at_once(supervisor, undisturbed):
    again = supervisor.run(supervisor.job("again", args=ARGS, steps=3, batch=LOGGED))
    more = supervisor.run(supervisor.job("again", args=ARGS, steps=2, batch=LOGGED, generation=2))
    assert more.process.returncode == wire.EXIT_COMPLETED
    assert more.steps == []
    assert (more.bye.outcome, more.bye.step) == ("completed", 3)
    assert more.bye.weights_sha256 == again.bye.weights_sha256
    assert more.ready.notes == [
        "Already at step 3, past the new target of 2: nothing to train. A target above 3 trains more."
    ]
    assert again.bye.weights_sha256 != undisturbed.bye.weights_sha256


def test_changes_that_cannot_be_resumed_are_refused(supervisor):
    supervisor.run(supervisor.job("changed", steps=2))
    changes = {
        "The seed differs from this run's (7 before, 8 now). Put it back, or begin anew with --fresh.": {"seed": 8},
        "The training data differ from this run's (48 samples before, 40 now). Put them": {"args": {"samples": 40}},
        "The optimizer differs from this run's (AdamW before, SGD now). Put it": {"args": {"optimizer": "SGD"}},
        "task.entry differs from this run's (toy_task:build before, toy_task:frozen_not now). Put it": {
            "entry": "toy_task:frozen_not"
        },
        "layers.0.bias: float32[16] → float32[12]": {"args": {"hidden": 12}},
    }
    for generation, (text, change) in enumerate(changes.items(), 2):
        worker = supervisor.run(supervisor.job("changed", steps=4, generation=generation, **change))
        assert worker.process.returncode == wire.EXIT_REFUSED, worker.stderr
        assert worker.bye.outcome == "refused"
        assert text in worker.bye.reason
        assert worker.stderr.splitlines()[-1] == f"refused: {worker.bye.reason}"
        assert worker.saved_steps == [2], "a refusal must not change the checkpoints"


def test_changes_that_can_be_resumed_are_reported(supervisor):
    first = supervisor.run(supervisor.job("rate", steps=2, args={"schedule": False}))
    reduced = {"size": 4, "effective": 8, "requested_size": 8, "requested_effective": 8}
    changed = {"args": {"schedule": False, "rate": 0.5}, "batch": reduced}
    second = supervisor.run(supervisor.job("rate", steps=4, generation=2, **changed))
    assert first.steps[-1].learning_rate == pytest.approx(0.01)
    assert second.steps[0].learning_rate == pytest.approx(0.5), "the new rate counts, not the checkpoint's"
    third = supervisor.run(supervisor.job("rate", steps=5, args={"schedule": True, "rate": 0.5}, generation=3))
    fourth = supervisor.run(supervisor.job("rate", steps=6, args={"schedule": False, "rate": 0.5}, generation=4))
    assert third.steps[0].learning_rate < 0.5, "the new schedule, at the step where the run is"
    assert fourth.steps[0].learning_rate == pytest.approx(0.5), "no schedule any more"
    assert first.ready.notes == []
    assert second.ready.notes == [  # and nothing on the micro-batch: the supervisor reports that
        "Target raised: 2 → 4 steps.",
        "Learning rate changed: 0.01 → 0.5, from step 3.",
        "task.args.rate changed: none → 0.5, from step 3.",
    ]


def test_a_damaged_checkpoint_is_skipped(supervisor):
    job = {"args": ARGS, "checkpoint": EVERY}
    first = supervisor.run(supervisor.job("damaged", steps=6, **job))
    weights = first.folder / "checkpoints" / "step-000000006" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    second = supervisor.run(supervisor.job("damaged", steps=6, generation=2, **job))
    assert second.ready.step == 3
    assert "step-000000006" in second.ready.skipped[0]
    assert second.bye.weights_sha256 == first.bye.weights_sha256


def test_trainer_json_of_another_version_is_refused(supervisor):
    first = supervisor.run(supervisor.job("newer", steps=1))
    folder = first.folder / "checkpoints" / "step-000000001"
    trainer = json.loads((folder / "trainer.json").read_text())
    assert trainer["progress"]["samples"] == 8
    assert trainer["schedule_step"] == 1
    reseal(folder, json.dumps(trainer | {"v": 99}).encode())
    second = supervisor.run(supervisor.job("newer", steps=2, generation=2))
    assert second.process.returncode == wire.EXIT_REFUSED
    assert "expected version 1, found 99" in second.bye.reason


def reseal(folder, trainer):
    """As a future version would have written it: the manifest verifies."""
    import hashlib

    import msgspec

    (folder / "trainer.json").write_bytes(trainer)
    manifest = load_manifest((folder / "MANIFEST.json").read_bytes())
    entry = FileEntry("trainer.json", len(trainer), hashlib.sha256(trainer).hexdigest())
    files = [entry if old.name == "trainer.json" else old for old in manifest.files]
    (folder / "MANIFEST.json").write_bytes(wire.dump_json(msgspec.structs.replace(manifest, files=files)))
