"""Every feature of a task survives a cut: the run ends with the bits of an undisturbed one."""

import signal
from pathlib import Path

import pytest
from tests.training.own_task import feature_task, harness

from mlx_supervisor import wire
from mlx_worker.errors import RefusedError

FEATURES = ["clipped", "averaged", "metrics", "state", "skipped stream", "positioned stream", "indexed"]
STEPS = 9


@pytest.mark.parametrize(("feature", "size"), [*((each, 8) for each in FEATURES), ("clipped", 3), ("metrics", 3)])
def test_a_cut_run_ends_with_the_same_bits(tmp_path, monkeypatch, feature, size):
    job = {"args": {"features": [feature]}, "batch": {"size": size, "effective": 8, "sample_log": True}}
    whole = harness.run(tmp_path / "whole", monkeypatch, steps=STEPS, **job)
    first = harness.run(tmp_path / "cut", monkeypatch, steps=4, **job)
    second = harness.run(tmp_path / "cut", monkeypatch, steps=STEPS, generation=2, **job)
    assert harness.digests(tmp_path / "cut", STEPS) == harness.digests(tmp_path / "whole", STEPS)
    assert second.weights == whole.weights
    assert first.losses + second.losses == whole.losses
    assert [step.metrics for step in first.steps + second.steps] == [step.metrics for step in whole.steps]
    logs = [(tmp_path / name / "samples.jsonl").read_text() for name in ("cut", "whole")]
    assert logs[0].replace('"generation": 2', '"generation": 1') == logs[1]


def kill_and_resume(supervisor, features):
    """A run killed by SIGKILL at its 8th update, between two checkpoints, and an undisturbed one."""
    task = {"kind": "python", "base_dir": str(Path(feature_task.__file__).parent), "entry": "feature_task:build"}
    task["args"] = {"features": features, "evaluate_every": 5}
    job = {"task": task, "steps": 12, "batch": {"size": 8}, "checkpoint": {"every_seconds": 0, "every_steps": 3}}
    calm = supervisor.run(supervisor.job(**job), compiled=True)
    assert calm.process.returncode == wire.EXIT_COMPLETED, calm.stderr
    hang = {"hang_at_step": 8, "generations": [1]}
    name = f"killed-{len(supervisor.workers)}"
    killed = supervisor.start(supervisor.job(name, drill=hang, **job), compiled=True)
    killed.until(wire.Step, lambda message: message.step == 7)
    killed.until_saved(6)
    killed.signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    resumed = supervisor.run(supervisor.job(name, drill=hang, generation=2, **job), compiled=True)
    assert resumed.process.returncode == wire.EXIT_COMPLETED, resumed.stderr
    assert resumed.ready.step == 6
    return calm, killed, resumed


def assert_equal(calm, killed, resumed):
    assert resumed.bye.weights_sha256 == calm.bye.weights_sha256
    assert harness.digests(resumed.folder, 12) == harness.digests(calm.folder, 12)
    losses = {step.step: (step.loss, step.metrics) for worker in (killed, resumed) for step in worker.steps}
    assert losses == {step.step: (step.loss, step.metrics) for step in calm.steps}
    assert resumed.of(wire.Validation)[-1].loss == calm.of(wire.Validation)[-1].loss
    exports = [(worker.folder / "export" / "exported.safetensors").read_bytes() for worker in (calm, resumed)]
    assert exports[0] == exports[1]


def test_killed_with_every_feature_it_ends_with_the_same_bits(supervisor):
    assert_equal(*kill_and_resume(supervisor, feature_task.ALL))


@pytest.mark.long
@pytest.mark.parametrize("feature", FEATURES)
def test_killed_with_one_feature_it_ends_with_the_same_bits(supervisor, feature):
    assert_equal(*kill_and_resume(supervisor, [feature]))


def test_each_feature_changes_the_result(tmp_path, monkeypatch):
    """Otherwise the tests above show nothing."""
    plain = harness.run(tmp_path / "plain", monkeypatch, steps=3)
    for feature in ("clipped", "state", "skipped stream"):
        assert (
            harness.run(tmp_path / feature, monkeypatch, steps=3, args={"features": [feature]}).weights != plain.weights
        )


def test_a_positioned_stream_reads_nothing_again(tmp_path, monkeypatch):
    made = []
    job = {"args": {"features": ["positioned stream"]}, "changes": lambda task: made.append(task.dataset)}
    harness.run(tmp_path / "run", monkeypatch, steps=2, **job)
    second = harness.run(tmp_path / "run", monkeypatch, steps=3, generation=2, **job)
    assert [dataset.read for dataset in made] == [16, 8]
    assert not second.notes[1:], second.notes
    job["args"] = {"features": ["skipped stream"]}
    harness.run(tmp_path / "skipping", monkeypatch, steps=2, **job)
    third = harness.run(tmp_path / "skipping", monkeypatch, steps=3, generation=2, **job)
    assert any(note.startswith("Skipped 16 samples of Task.dataset in ") for note in third.notes)


def test_a_task_that_gains_or_loses_a_feature_says_so(tmp_path, monkeypatch):
    def resumed(step, *features, **job):
        return " | ".join(
            harness.run(
                tmp_path / "r", monkeypatch, steps=step, generation=step, args={"features": features}, **job
            ).notes
        )

    resumed(1)
    on = resumed(2, "averaged", "state", "clipped")
    assert "Averaging of the weights begins with those of step 1 (ema_decay = 0.9)." in on
    assert "The checkpoint of step 1 has no state of the task's own: that begins anew." in on
    assert "max_grad_norm changed: none → 0.05, from step 2." in on
    changed = resumed(3, "averaged", "state", "clipped", ema_decay=0.5, max_grad_norm=2.0)
    assert "ema_decay changed: 0.9 → 0.5, from step 3" in changed
    assert "max_grad_norm changed: 0.05 → 2, from step 3." in changed
    off = resumed(4, "averaged", ema_decay=0.0)
    assert "The averaged weights are dropped, from step 4: ema_decay is off." in off
    assert "The task's own state in the checkpoint of step 3 is dropped: Task.load_state is not set." in off
    assert "ema.safetensors" not in harness.digests(tmp_path / "r", 4)


def test_a_refused_resume_says_what_fresh_does_to_the_results(tmp_path, monkeypatch):
    def exported(task):
        task.export_dir = tmp_path / "results"

    harness.run(tmp_path / "r", monkeypatch, steps=2, changes=exported)
    with pytest.raises(RefusedError, match="The seed differs") as refused:
        harness.run(tmp_path / "r", monkeypatch, steps=4, generation=2, changes=exported, seed=8)
    overwrites = f"--fresh overwrites the results in {tmp_path / 'results'}"
    keep = "to keep them, set Task.export_dir to another folder."
    assert str(refused.value).endswith(f"with --fresh. {overwrites}; {keep}")
