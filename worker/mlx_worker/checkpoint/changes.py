"""What changed between a checkpoint and the settings of today, in a sentence each: applied from a step, or refused.

The facts compared are those of `training_state.recipe`. What the supervisor changes itself (the micro-batch in use, the
measured time between failures, gradient checkpointing on the escalation ladder) is no change of the user's.
docs/checkpoints.md has the same table for users.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from mlx_supervisor import wire
from mlx_worker.errors import ChangedError

Facts = Mapping[str, Any]
VALUE_LIMIT_CHARS = 80
LEAVES_SHOWN = 6
_ABSENT = object()
INTRODUCED = {"weights", "tokenizer", "text_feature", "chat_feature", "prompt_feature", "completion_feature"}
"""Fixed facts that the checkpoints of older versions lack: the first checkpoint that has them decides."""


def compare(old: Facts, new: Facts, step: int) -> list[str]:
    """A sentence for each change that is applied, at a resume from `step`.

    `old`, `new`: the recipes of the checkpoint and of the job. Raises RefusedError with a sentence for each change that
    is not allowed.
    """
    refused = [sentence for name, pair in _changed(old["fixed"], new["fixed"]) for sentence in _refused(name, *pair)]
    if refused:
        it = "it" if len(refused) == 1 and " differs " in refused[0] else "them"
        raise ChangedError(f"{' '.join(refused)} Put {it} back, or begin anew with --fresh.")
    changed = dict(_changed(old["free"], new["free"]))
    if "lr_schedule" in changed:
        changed.pop("learning_rate", None)
    notes = []
    for name, (before, now) in changed.items():
        known = name in _FREE or name in PLAIN
        if known and (before is _ABSENT or now is _ABSENT):
            continue
        notes += _FREE.get(name, partial(_generic, name))(before, now, step)
    return notes


def tighter(checkpoint: wire.CheckpointJob, old: Facts | None) -> list[str]:
    """The note on the supervisor's own change: a shorter interval after a generation that saved nothing.

    `old`: the recipe of the checkpoint; None without one.
    """
    now = checkpoint.tighter_steps
    before = 0 if old is None else old["free"].get("checkpoint", {}).get("tighter_steps", 0)
    if now == 0 or 0 < before <= now or 0 < checkpoint.every_steps <= now:
        return []
    return [f"Checkpoints every {_counted(now, 'step')} from now on: the last generation saved nothing."]


def _changed(old: Facts, new: Facts) -> Iterator[tuple[str, tuple[Any, Any]]]:
    for name in [*old, *(name for name in new if name not in old)]:
        before, now = old.get(name, _ABSENT), new.get(name, _ABSENT)
        if before != now:
            yield name, (before, now)


# ---- refused


def _refused(name: str, old: Any, new: Any) -> list[str]:
    if old is _ABSENT and name in INTRODUCED:
        return []
    if new is _ABSENT and name == "model":  # older checkpoints: the name or path, which means nothing
        return []
    if name == "resume_adapter_file":
        return _adapter_file(old, new)
    if name in _SUBJECTS and name not in ("dataset", "tokenizer"):
        return [f"{_SUBJECTS[name]} {'differ' if _SUBJECTS[name].endswith('weights') else 'differs'} from this run's."]
    if name == "dataset":
        return [_data(old, new)]
    if name == "tokenizer":
        files = sorted(each for each in {*old, *new} if old.get(each) != new.get(each))
        return [f"The tokenizer differs from this run's ({', '.join(files)})."]
    return [
        f"{_NAMES.get(path, path)} differs from this run's ({_shown(before)} before, {_shown(now)} now)."
        for path, before, now in _leaves(name, old, new)
    ]


_SUBJECTS = {
    "dataset": "The training data",
    "weights": "The base model's weights",
    "model.config_sha256": "The base model's config.json",
    "tokenizer": "The tokenizer",
}
_NAMES = {"seed": "The seed", "task.kind": "The task's kind", "optimizer": "The optimizer", "entry": "task.entry"}


def _data(old: Any, new: Any) -> str:
    before, now = (facts.get("samples") if isinstance(facts, dict) else None for facts in (old, new))
    if before == now:
        return f"The training data differ from this run's ({_shown(now)} samples as before, with other content)."
    return f"The training data differ from this run's ({_shown(before)} samples before, {_shown(now)} now)."


def _adapter_file(old: Any, new: Any) -> list[str]:
    """The same path or the same content will do: its weights count at step 0 only, and exports replace the file."""
    before, now = (facts if isinstance(facts, dict) else {"path": facts, "sha256": None} for facts in (old, new))
    if before["path"] == now["path"] or (before["sha256"] is not None and before["sha256"] == now["sha256"]):
        return []
    paths = f"{_shown(before['path'])} before, {_shown(now['path'])} now"
    return [f"resume_adapter_file differs from this run's ({paths})."]


# ---- applied


def _steps(old: int, new: int, step: int) -> list[str]:
    if step >= new:
        where = f"past the new target of {new}" if step > new else "the new target"
        return [f"Already at step {step}, {where}: nothing to train. A target above {step} trains more."]
    return [f"Target {'raised' if new > old else 'lowered'}: {old} → {new} steps."]


def _batch(old: Any, new: Any, step: int) -> list[str]:
    texts = []
    for size, effective in ((each["size"], each["effective"]) for each in (old, new)):
        whole = effective % size == 0
        texts.append(f"{size} × {effective // size}" if whole else f"{size} of {effective}")
    return [f"Batch changed: {texts[0]} → {texts[1]} (micro-batch × accumulation), {_from(step)}."]


def _rates(old: Facts, new: Facts, step: int) -> list[str]:
    notes = []
    for name in [*old, *(name for name in new if name not in old)]:
        before, now = (_rate(facts.get(name)) for facts in (old, new))
        if before != now:
            of = "" if len(new) == 1 else f" of {name.rpartition('.')[0] or name}"
            notes.append(f"Learning rate{of} changed: {before} → {now}, {_from(step)}.")
    return notes


def _rate(rate: Any) -> str:
    """Stored as float32: six digits are what the user wrote."""
    if not isinstance(rate, dict):
        return "none"
    return f"{rate['initial']:.6g}{', scheduled' if rate['scheduled'] else ''}"


def _schedule(old: Any, new: Any, step: int) -> list[str]:
    before, now = (_schedule_text(each) for each in (old, new))
    return [f"lr_schedule changed: {before} → {now}, {_from(step)}."]


def _schedule_text(schedule: Any) -> str:
    if not isinstance(schedule, dict):
        return _shown(schedule)
    arguments = schedule.get("arguments")
    listed = ", ".join(map(_shown, arguments)) if isinstance(arguments, list) else _shown(arguments)
    warmup = f" with warmup {_shown(schedule['warmup'])}" if schedule.get("warmup") else ""
    return f"{schedule.get('name')}({listed}){warmup}"


def _checkpoint(old: Any, new: Any, step: int) -> list[str]:
    before, now = (_interval(each) for each in (old, new))
    notes = [] if before == now else [f"Checkpoints changed: {before} → {now}."]
    for key in ("keep", "keep_best"):
        if old.get(key) != new.get(key):
            notes.append(f"checkpoint.{key} changed: {_shown(old.get(key))} → {_shown(new.get(key))}.")
    return notes


def _interval(job: Facts) -> str:
    every = [
        *([f"every {_counted(job['every_steps'], 'step')}"] if job.get("every_steps") else []),
        *([f"every {job['every_seconds']:g} s"] if job.get("every_seconds") else []),
    ]
    automatic = f"automatic (at most {job['overhead']:.3g} of the time)" if job.get("overhead") else "only at the end"
    return " and ".join(every) or automatic


def _memory(old: Any, new: Any, step: int) -> list[str]:
    """`gradient_checkpointing` on is in the ready notice. A device limit follows from the device: not said."""
    notes = []
    for key in ("policy", "clear_before_gradients", "clear_after_gradients", "clear_after_update", "release_pause_s"):
        if old.get(key) != new.get(key):
            notes.append(f"memory.{key} changed: {_shown(old.get(key))} → {_shown(new.get(key))}, {_from(step)}.")
    for key, name in (("cache_limit_bytes", "memory.cache_limit"), ("limit_bytes", "Memory limit")):
        if old.get(key) != new.get(key):
            notes.append(f"{name} changed: {_size(old.get(key))} → {_size(new.get(key))}.")
    if old.get("gradient_checkpointing") and not new.get("gradient_checkpointing"):
        notes.append(f"Gradient checkpointing is off, {_from(step)}.")
    return notes


def _frozen(old: Any, new: Any, step: int) -> list[str]:
    return [f"The model's frozen weights differ from the checkpoint's; training uses the new ones, {_from(step)}."]


def _validation(old: Any, new: Any, step: int) -> list[str]:
    if "" in (old, new):
        return [f"Validation is {'off' if new == '' else 'on'}, {_from(step)}."]
    return [f"The validation data changed: validation losses before and after step {step} can't be compared."]


def _unsaid(old: Any, new: Any, step: int) -> list[str]:
    return []


_FREE: dict[str, Callable[[Any, Any, int], list[str]]] = {
    "steps": _steps,
    "batch.requested": _batch,
    "batch.size": _unsaid,  # the supervisor changes these two, and reports it
    "batch.effective": _unsaid,
    "learning_rate": _rates,
    "lr_schedule": _schedule,
    "checkpoint": _checkpoint,
    "memory": _memory,
    "frozen_weights": _frozen,
    "validation_data": _validation,
}
"""The words for a change of each free fact. A fact that one side lacks is not compared: another version wrote it."""
PLAIN = {
    *(
        "batch.preserve_effective",
        "max_grad_norm",
        "deterministic",
        "stop_on_not_finite",
        "grad_checkpoint",
        "optimizer_config",
    ),
    *("val_batches", "steps_per_eval", "save_every", "test", "test_batches", "adapter_path"),
    "mlx_lm_compatible",
}
"""The same, with the generic words."""


# ---- words


def _generic(name: str, old: Any, new: Any, step: int) -> list[str]:
    return [
        f"{path} changed: {_shown(before)} → {_shown(now)}, {_from(step)}."
        for path, before, now in _leaves(name, old, new)
    ]


def _leaves(name: str, old: Any, new: Any) -> list[tuple[str, Any, Any]]:
    """The values that differ in a fact, each with its path: tables are compared key by key."""
    if not isinstance(old, dict) or not isinstance(new, dict):
        return [(name, old, new)]
    pairs = list(_changed(old, new))
    if len(pairs) > LEAVES_SHOWN:
        return [(name, old, new)]
    return [leaf for key, pair in pairs for leaf in _leaves(f"{name}.{key}", *pair)]


def _from(step: int) -> str:
    return f"from step {step + 1}"


def _size(size_bytes: Any) -> str:
    return "none" if size_bytes is None else f"{size_bytes / 2**20:,.0f} MiB"


def _counted(count: int, what: str) -> str:
    return what if count == 1 else f"{count} {what}s"


def _shown(value: Any) -> str:
    if value is _ABSENT or value is None:
        return "none"
    if isinstance(value, float):
        return f"{value:.6g}"
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= VALUE_LIMIT_CHARS else text[: VALUE_LIMIT_CHARS - 3] + "..."
