"""What a changed setting means at a resume: a table with each kind of key, and the one sentence that is printed."""

import copy

import pytest
from tests.training import jobs

from mlx_worker.checkpoint import changes
from mlx_worker.errors import RefusedError

STEP = 20
FIXED = {
    "seed": 0, "task.kind": "mlx_lm", "optimizer": "Adam", "dataset": {"samples": 160, "fingerprint": "6899"},
    "weights": "ab", "model.config_sha256": "cd", "tokenizer": {"tokenizer.json": "1", "merges.txt": "2"},
    "fine_tune_type": "lora", "lora_parameters": {"rank": 8, "scale": 20.0}, "num_layers": 16,
    "resume_adapter_file": {"path": "a.safetensors", "sha256": "11"}, "mask_prompt": False, "max_seq_length": 2048,
    "text_feature": None, "entry": "train:build", "mine": {"width": 3},
}  # fmt: skip
FREE = {
    "steps": 100, "batch.requested": {"size": 4, "effective": 8}, "batch.size": 4, "batch.effective": 8,
    "batch.preserve_effective": True,
    "learning_rate": {"learning_rate": {"initial": 0.0010000000474, "scheduled": False}},
    "checkpoint": {
        "every_steps": 5, "tighter_steps": 0, "every_seconds": 0.0, "overhead": 0.0, "keep": 3, "keep_best": False,
    },
    "memory": {
        "policy": "adaptive", "clear_after_update": True, "cache_limit_bytes": None, "limit_bytes": 1700 * 2**20,
        "gradient_checkpointing": False, "release_pause_s": 0.0,
    },
    "deterministic": False, "lr_schedule": None, "optimizer_config": {"weight_decay": 0.01}, "grad_checkpoint": False,
    "steps_per_eval": 200, "adapter_path": "adapters", "validation_data": "v", "task.args": {"hidden": 64, "rate": 0.1},
    "frozen_weights": "f", "my note": "a",
}  # fmt: skip
RATE = {"learning_rate": {"initial": 0.0005000000237, "scheduled": False}}
SCHEDULE = {"name": "cosine_decay", "arguments": [0.001, 100], "warmup": 10}

REFUSED = [
    ("seed", 1, "The seed differs from this run's (0 before, 1 now). Put it back, or begin anew with --fresh."),
    ("task.kind", "python", "The task's kind differs from this run's (mlx_lm before, python now). Put it back"),
    ("optimizer", "Muon", "The optimizer differs from this run's (Adam before, Muon now). Put it back"),
    ("dataset", {"samples": 200, "fingerprint": "7"},
     "The training data differ from this run's (160 samples before, 200 now). Put them back, or begin anew with "),
    ("dataset", {"samples": 160, "fingerprint": "7"},
     "The training data differ from this run's (160 samples as before, with other content). Put them back"),
    ("weights", "xy", "The base model's weights differ from this run's. Put them back, or begin anew with --fresh."),
    ("model.config_sha256", "xy", "The base model's config.json differs from this run's. Put it back"),
    ("tokenizer", {"tokenizer.json": "3", "merges.txt": "2"},
     "The tokenizer differs from this run's (tokenizer.json). Put it back"),
    ("fine_tune_type", "dora", "fine_tune_type differs from this run's (lora before, dora now). Put it back"),
    ("lora_parameters", {"rank": 16, "scale": 20.0},
     "lora_parameters.rank differs from this run's (8 before, 16 now). Put"),
    ("num_layers", 8, "num_layers differs from this run's (16 before, 8 now). Put it back"),
    ("resume_adapter_file", {"path": "b.safetensors", "sha256": "22"},
     "resume_adapter_file differs from this run's (a.safetensors before, b.safetensors now). Put it back"),
    ("mask_prompt", True, "mask_prompt differs from this run's (false before, true now). Put it back"),
    ("max_seq_length", 128, "max_seq_length differs from this run's (2048 before, 128 now). Put it back"),
    ("text_feature", "body", "text_feature differs from this run's (none before, body now). Put it back"),
    ("entry", "other:build", "task.entry differs from this run's (train:build before, other:build now). Put it back"),
    ("mine", {"width": 4}, "mine.width differs from this run's (3 before, 4 now). Put it back"),
]  # fmt: skip

APPLIED = [
    ("learning_rate", RATE, "Learning rate changed: 0.001 → 0.0005, from step 21."),
    ("lr_schedule", SCHEDULE, "lr_schedule changed: none → cosine_decay(0.001, 100) with warmup 10, from step 21."),
    ("steps", 200, "Target raised: 100 → 200 steps."),
    ("steps", 50, "Target lowered: 100 → 50 steps."),
    ("steps", 20, "Already at step 20, the new target: nothing to train. A target above 20 trains more."),
    ("steps", 10, "Already at step 20, past the new target of 10: nothing to train. A target above 20 trains more."),
    ("batch.requested", {"size": 8, "effective": 8},
     "Batch changed: 4 × 2 → 8 × 1 (micro-batch × accumulation), from step 21."),
    ("batch.requested", {"size": 4, "effective": 10},
     "Batch changed: 4 × 2 → 4 of 10 (micro-batch × accumulation), from step 21."),
    ("batch.preserve_effective", False, "batch.preserve_effective changed: true → false, from step 21."),
    ("checkpoint", FREE["checkpoint"] | {"every_steps": 2}, "Checkpoints changed: every 5 steps → every 2 steps."),
    ("checkpoint", FREE["checkpoint"] | {"every_steps": 0, "overhead": 0.01},
     "Checkpoints changed: every 5 steps → automatic (at most 0.01 of the time)."),
    ("checkpoint", FREE["checkpoint"] | {"keep": 5}, "checkpoint.keep changed: 3 → 5."),
    ("memory", FREE["memory"] | {"policy": "always"}, "memory.policy changed: adaptive → always, from step 21."),
    ("memory", FREE["memory"] | {"limit_bytes": 2000 * 2**20}, "Memory limit changed: 1,700 MiB → 2,000 MiB."),
    ("memory", FREE["memory"] | {"cache_limit_bytes": 2**20}, "memory.cache_limit changed: none → 1 MiB."),
    ("deterministic", True, "deterministic changed: false → true, from step 21."),
    ("optimizer_config", {"weight_decay": 0.1}, "optimizer_config.weight_decay changed: 0.01 → 0.1, from step 21."),
    ("grad_checkpoint", True, "grad_checkpoint changed: false → true, from step 21."),
    ("steps_per_eval", 50, "steps_per_eval changed: 200 → 50, from step 21."),
    ("adapter_path", "out", "adapter_path changed: adapters → out, from step 21."),
    ("validation_data", "w",
     "The validation data changed: validation losses before and after step 20 can't be compared."),
    ("validation_data", "", "Validation is off, from step 21."),
    ("task.args", {"hidden": 64, "rate": 0.2}, "task.args.rate changed: 0.1 → 0.2, from step 21."),
    ("frozen_weights", "g",
     "The model's frozen weights differ from the checkpoint's; training uses the new ones, from step 21."),
    ("my note", "b", "my note changed: a → b, from step 21."),
]  # fmt: skip

UNSAID = [
    ("batch.size", 2),  # after a trip; the supervisor says so
    ("batch.effective", 4),
    ("memory", FREE["memory"] | {"gradient_checkpointing": True}),  # in the ready notice
    ("checkpoint", FREE["checkpoint"] | {"tighter_steps": 2}),  # see `tighter`
]


def compared(part, name, value):
    old = {"fixed": FIXED, "free": FREE}
    new = copy.deepcopy(old)
    new[part][name] = value
    return changes.compare(old, new, STEP)


@pytest.mark.parametrize(("name", "value", "sentence"), REFUSED)
def test_a_change_that_would_be_another_training_is_refused(name, value, sentence):
    with pytest.raises(RefusedError) as refused:
        compared("fixed", name, value)
    text = str(refused.value)
    assert text.startswith(sentence)
    assert text.endswith(" back, or begin anew with --fresh.")


@pytest.mark.parametrize(("name", "value", "sentence"), APPLIED)
def test_a_change_that_is_applied_is_said_in_one_sentence(name, value, sentence):
    assert compared("free", name, value) == [sentence]


@pytest.mark.parametrize(("name", "value"), UNSAID)
def test_what_the_supervisor_changes_is_no_change_of_the_users(name, value):
    assert compared("free", name, value) == []


def test_nothing_changed_says_nothing():
    assert changes.compare({"fixed": FIXED, "free": FREE}, {"fixed": FIXED, "free": FREE}, STEP) == []


def test_several_refused_changes_are_all_named():
    new = {"fixed": FIXED | {"seed": 1, "weights": "x"}, "free": FREE}
    with pytest.raises(RefusedError, match=r"seed differs .* weights differ from this run's\. Put them back, or"):
        changes.compare({"fixed": FIXED, "free": FREE}, new, STEP)


def test_a_schedule_is_not_said_twice():
    rates = {"learning_rate": {"initial": 0.0, "scheduled": True}}
    new = {"fixed": FIXED, "free": FREE | {"lr_schedule": SCHEDULE, "learning_rate": rates}}
    assert len(changes.compare({"fixed": FIXED, "free": FREE}, new, STEP)) == 1


def test_a_checkpoint_of_an_older_version_is_accepted():
    """It has the model's path, and lacks what was introduced later."""
    old = {
        "fixed": {name: FIXED[name] for name in FIXED if name not in changes.INTRODUCED}
        | {"model": "/old/path", "resume_adapter_file": "a.safetensors"},
        "free": {name: FREE[name] for name in FREE if name not in ("batch.requested", "validation_data")},
    }
    assert changes.compare(old, {"fixed": FIXED, "free": FREE}, STEP) == []


def test_an_adapter_file_is_the_same_by_path_or_content():
    for same in ({"path": "a.safetensors", "sha256": "22"}, {"path": "moved.safetensors", "sha256": "11"}):
        assert compared("fixed", "resume_adapter_file", same) == []


@pytest.mark.parametrize(
    ("before", "now", "every", "said"),
    [(None, 2, 0, True), (0, 2, 0, True), (4, 2, 0, True), (2, 2, 0, False), (2, 4, 0, False), (0, 5, 5, False),
     (0, 0, 0, False)],
)  # fmt: skip
def test_a_tighter_interval_is_the_supervisors_own(before, now, every, said):
    job = jobs.job(checkpoint={"tighter_steps": now, "every_steps": every}).checkpoint
    old = None if before is None else {"free": {"checkpoint": {"tighter_steps": before}}}
    expected = ["Checkpoints every 2 steps from now on: the last generation saved nothing."]
    assert changes.tighter(job, old) == (expected if said else [])
