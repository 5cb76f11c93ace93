"""Checks of `optimizer_config` and `lr_schedule`. A test compares the tables with MLX's functions."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from mlx_worker.errors import RefusedError
from mlx_worker.tasks.suggest import did_you_mean, or_list

OPTIMIZER_OPTIONS: dict[str, dict[str, str]] = {
    "adam": {"betas": "pair", "eps": "number", "bias_correction": "boolean"},
    "adamw": {"betas": "pair", "eps": "number", "weight_decay": "number", "bias_correction": "boolean"},
    "muon": {"momentum": "number", "weight_decay": "number", "nesterov": "boolean", "ns_steps": "count"},
    "sgd": {"momentum": "number", "weight_decay": "number", "dampening": "number", "nesterov": "boolean"},
    "adafactor": {
        "eps": "pair", "clip_threshold": "number", "decay_rate": "number", "beta_1": "number", "weight_decay": "number",
        "scale_parameter": "boolean", "relative_step": "boolean", "warmup_init": "boolean",
    },
}  # fmt: skip
"""By optimizer, the options besides the learning rate, and what each takes."""
OPTIMIZERS = tuple(OPTIMIZER_OPTIONS)
SCHEDULES: dict[str, tuple[tuple[str, ...], int]] = {
    "cosine_decay": (("init", "decay_steps", "end"), 2),
    "exponential_decay": (("init", "decay_rate"), 2),
    "linear_schedule": (("init", "end", "steps"), 3),
    "step_decay": (("init", "decay_rate", "step_size"), 3),
}
"""By schedule, its arguments in order, and how many are required."""
SCHEDULE_KEYS = ("name", "arguments", "warmup", "warmup_init")
_COUNTS = {"decay_steps", "steps", "step_size"}
_EXAMPLE = "lr_schedule: {name: cosine_decay, arguments: [1e-5, 1000], warmup: 100}"

Refuse = Callable[[str, str], RefusedError]
"""Takes the key and the text."""


def is_number(value: object) -> bool:
    """Whether this is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_count(value: object) -> bool:
    """Whether this is a whole number of at least 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "number": (is_number, "a number"),
    "boolean": (lambda value: isinstance(value, bool), "true or false"),
    "count": (is_count, "a whole number of at least 1"),
    "pair": (
        lambda value: isinstance(value, list) and len(value) == 2 and all(map(is_number, value)),
        "a list of two numbers",
    ),
}


def check_optimizer(optimizer: str, options: Mapping[Any, Any], refuse: Refuse) -> None:
    """Check `optimizer` (in lower case) and `optimizer_config`."""
    if optimizer not in OPTIMIZERS:
        near = did_you_mean(optimizer, OPTIMIZERS)
        raise refuse("optimizer", f"allowed: {', '.join(OPTIMIZERS)}; found {optimizer!r:.80}{near}")
    for name in options:
        if name not in OPTIMIZERS:
            if name in OPTIMIZER_OPTIONS[optimizer] or name == "learning_rate":
                raise refuse(
                    "optimizer_config", f"options are given by optimizer; write {{{optimizer}: {{{name}: …}}}}"
                )
            raise refuse(f"optimizer_config.{name}", f"unknown optimizer{or_list(name, OPTIMIZERS)}")
    own = options.get(optimizer)
    if own is not None and not isinstance(own, dict):
        raise refuse(f"optimizer_config.{optimizer}", f"expected a mapping, found {own!r:.80}")
    _check_options(optimizer, own or {}, refuse)


def _check_options(optimizer: str, own: Mapping[Any, Any], refuse: Refuse) -> None:
    key, known = f"optimizer_config.{optimizer}", OPTIMIZER_OPTIONS[optimizer]
    for name, value in own.items():
        if name == "learning_rate":
            raise refuse(f"{key}.learning_rate", "set the key learning_rate of the file instead")
        if name not in known:
            near = did_you_mean(name, known)
            raise refuse(f"{key}.{name}", f"unknown option; allowed are {', '.join(known)}{near}")
        valid, allowed = _KINDS[known[name]]
        if not valid(value):
            raise refuse(f"{key}.{name}", f"expected {allowed}, found {value!r:.80}")


def check_schedule(schedule: Mapping[Any, Any], refuse: Refuse) -> None:
    """Check `lr_schedule`."""
    for key in schedule:
        if key not in SCHEDULE_KEYS:
            raise refuse(f"lr_schedule.{key}", f"unknown key{or_list(key, SCHEDULE_KEYS, 'lr_schedule.')}")
    if not {"name", "arguments"} <= set(schedule):
        raise refuse("lr_schedule", f"expected the keys name and arguments, found {dict(schedule)!r:.80}; {_EXAMPLE}")
    name, arguments = schedule["name"], schedule["arguments"]
    if name not in SCHEDULES:
        near = did_you_mean(name, SCHEDULES)
        raise refuse("lr_schedule.name", f"unknown schedule {name!r:.80}{near or ';'} Allowed are {_signatures()}")
    names, required = SCHEDULES[name]
    if not isinstance(arguments, list) or not required <= len(arguments) <= len(names):
        found = f"{len(arguments)} values" if isinstance(arguments, list) else f"{arguments!r:.80}"
        raise refuse("lr_schedule.arguments", f"expected a list of the values of {_signature(name)}, found {found}")
    for argument, value in zip(names, arguments, strict=False):
        valid, allowed = _KINDS["count" if argument in _COUNTS else "number"]
        if not valid(value):
            raise refuse(
                "lr_schedule.arguments", f"{_signature(name)}: expected {allowed} for {argument}, found {value!r:.80}"
            )
    warmup, warmup_init = schedule.get("warmup"), schedule.get("warmup_init")
    if warmup and not is_count(warmup):
        raise refuse("lr_schedule.warmup", f"expected a whole number of updates, found {warmup!r:.80}")
    if warmup_init is not None and not is_number(warmup_init):
        raise refuse("lr_schedule.warmup_init", f"expected a number, found {warmup_init!r:.80}")


def _signature(name: str) -> str:
    names, required = SCHEDULES[name]
    optional = "".join(f"[, {each}]" for each in names[required:])
    return f"{name}({', '.join(names[:required])}{optional})"


def _signatures() -> str:
    return ", ".join(map(_signature, SCHEDULES))
