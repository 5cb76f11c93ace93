"""The unchanged YAML file of `mlx_lm.lora`, with mlx_lm's own defaults, checked before anything is loaded."""

import copy
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import yaml
from mlx_lm.lora import CONFIG_DEFAULTS, yaml_loader

from mlx_worker.errors import RefusedError

FINE_TUNE_TYPES = ("lora", "dora", "full")
OPTIMIZERS = ("adam", "adamw", "muon", "sgd", "adafactor")
_AT_LEAST = {
    "num_layers": -1, "batch_size": 1, "iters": 1, "val_batches": -1, "steps_per_report": 0, "steps_per_eval": 1,
    "save_every": 0, "test_batches": -1, "max_seq_length": 2, "grad_accumulation_steps": 1, "seed": 0,
}  # fmt: skip
_BOOLEANS = {"train", "test", "mask_prompt", "grad_checkpoint", "trust_remote_code"}
_FEATURES = {"prompt_feature", "completion_feature", "chat_feature", "text_feature"}
_STRINGS = {
    "model", "data", "fine_tune_type", "optimizer", "resume_adapter_file", "adapter_path", "report_to", "project_name",
} | _FEATURES  # fmt: skip
_MAPPINGS = {"optimizer_config", "lora_parameters", "lr_schedule"}
_NUMBERS = {"learning_rate", "clear_cache_threshold"}
_REFUSED = {"config": "a configuration file cannot include another"}
OPTIONS = {*_AT_LEAST, *_BOOLEANS, *_STRINGS, *_MAPPINGS, *_NUMBERS, *_REFUSED, "hf_dataset"}
"""Every known option of mlx_lm.lora, supported or refused with a reason. docs/mlx-lm.md describes each."""


@dataclass(frozen=True)
class LoraConfig:
    """The values for mlx_lm's functions, and the file they came from.

    `given`: the keys and values of the file and of the options that override it. `origins`: where each option was set,
    such as `--iters`. Without a file, `path` is a name in `base_dir` and `has_file` is false.
    """

    path: Path
    values: SimpleNamespace
    given: dict[str, Any]
    base_dir: Path
    origins: Mapping[str, str]
    has_file: bool

    def refuse(self, key: str, text: str) -> RefusedError:
        """An error that names the file and the key, or the option; the caller raises it."""
        first, dot, rest = key.partition(".")
        origin = self.origins.get(first)
        if origin is None and not self.has_file:
            origin = f"--{first.replace('_', '-')}"
        return RefusedError(f"{self.path}: {key}: {text}" if origin is None else f"{origin}{dot}{rest}: {text}")

    def resolve(self, name: str) -> Path:
        """A path in the file, relative to the file's folder if it exists there, else to the settings' folder."""
        beside = self.path.parent / Path(name).expanduser()
        return beside if beside.exists() else self.base_dir / Path(name).expanduser()


def load_config(
    config: str | None,
    base_dir: str,
    options: Mapping[str, Any] = MappingProxyType({}),
    origins: Mapping[str, str] = MappingProxyType({}),
) -> LoraConfig:
    """Read and check. `options` override the file or replace it; `origins`: see LoraConfig.

    Raises RefusedError that names the file, the key, what was found and what is allowed.
    """
    if not config and not options:
        raise RefusedError("task.config is missing: set it to the YAML file of mlx_lm.lora")
    path = Path(os.path.normpath(Path(base_dir) / Path(config or "options").expanduser()))
    given = (_read(path) if config else {}) | dict(options)
    values = copy.deepcopy(CONFIG_DEFAULTS) | {key: value for key, value in given.items() if value is not None}
    result = LoraConfig(path, SimpleNamespace(**values), given, Path(base_dir), origins, bool(config))
    for key, value in given.items():
        if value is not None:
            _check_key(result, key, value)
    _check_together(result)
    result.values.train = True  # mlx_lm's loaders read it
    return result


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open(encoding="utf-8") as file:
            given = yaml.load(file, yaml_loader)  # noqa: S506 - a SafeLoader, with mlx_lm's notation for floats
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise RefusedError(f"{path}{line}: invalid YAML: {getattr(error, 'problem', None) or error}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RefusedError(f"task.config: cannot read {path}: {error}") from None
    if not isinstance(given, dict) or not all(isinstance(key, str) for key in given):
        raise RefusedError(f"{path}: expected a mapping of names to values, found {type(given).__name__}")
    return given


def _check_key(config: LoraConfig, key: str, value: Any) -> None:
    if key not in OPTIONS:
        if key in CONFIG_DEFAULTS:
            raise config.refuse(key, "this mlx_lm.lora option is newer than mlx-supervisor and not supported yet")
        raise config.refuse(key, "unknown key; allowed are " + ", ".join(sorted(OPTIONS - set(_REFUSED))))
    if key in _REFUSED:
        if value:
            raise config.refuse(key, f"not supported: {_REFUSED[key]}")
    elif key == "hf_dataset":
        _check_hub(config, value)
    elif key in _AT_LEAST:
        if not isinstance(value, int) or isinstance(value, bool) or value < _AT_LEAST[key]:
            raise config.refuse(key, f"expected a whole number of at least {_AT_LEAST[key]}, found {value!r:.80}")
    elif key in _NUMBERS:
        if not isinstance(value, int | float) or isinstance(value, bool) or not value >= 0:
            raise config.refuse(key, f"expected a number of at least 0, found {value!r:.80}")
    else:
        _check_kind(config, key, value)


def _check_kind(config: LoraConfig, key: str, value: Any) -> None:
    for kind, keys in {bool: _BOOLEANS, str: _STRINGS, dict: _MAPPINGS}.items():
        if key in keys and not isinstance(value, kind):
            raise config.refuse(key, f"expected {_NAMES[kind]}, found {value!r:.80}")


def _check_hub(config: LoraConfig, value: Any) -> None:
    for dataset in value if isinstance(value, list) else [value]:
        if not isinstance(dataset, dict) or not isinstance(dataset.get("path"), str):
            raise config.refuse("hf_dataset", f"expected a mapping with a path, or a list of them, found {value!r:.80}")


_NAMES: dict[type, str] = {bool: "true or false", str: "text", dict: "a mapping"}


def _check_together(config: LoraConfig) -> None:
    values = config.values
    optimizer, accumulation, schedule = values.optimizer.lower(), values.grad_accumulation_steps, values.lr_schedule
    options = values.optimizer_config.get(optimizer)
    if config.given.get("train") is False:
        raise config.refuse("train", "must be true, found false; to test finished adapters, use mlx_lm.lora --test")
    if values.fine_tune_type not in FINE_TUNE_TYPES:
        raise config.refuse("fine_tune_type", f"allowed: {', '.join(FINE_TUNE_TYPES)}; found {values.fine_tune_type!r}")
    if optimizer not in OPTIMIZERS:
        raise config.refuse("optimizer", f"allowed: {', '.join(OPTIMIZERS)}; found {values.optimizer!r}")
    if options and not isinstance(options, dict):
        raise config.refuse(f"optimizer_config.{optimizer}", f"expected a mapping, found {options!r:.80}")
    if values.fine_tune_type != "full":
        _check_lora(config)
    if schedule is not None and not {"name", "arguments"} <= set(schedule):
        raise config.refuse("lr_schedule", f"expected the keys name and arguments, found {schedule!r:.80}")
    if accumulation > values.iters:
        raise config.refuse(
            "iters", f"expected at least grad_accumulation_steps ({accumulation}), found {values.iters}"
        )


def _check_lora(config: LoraConfig) -> None:
    for key, kinds, in_range, allowed in (
        ("rank", int, lambda value: value >= 1, "a whole number of at least 1"),
        ("scale", (int, float), lambda value: True, "a number"),
        ("dropout", (int, float), lambda value: 0 <= value < 1, "a number of at least 0 and less than 1"),
    ):
        value = config.values.lora_parameters.get(key)
        if not isinstance(value, kinds) or isinstance(value, bool) or not in_range(value):
            raise config.refuse(f"lora_parameters.{key}", f"expected {allowed}, found {value!r:.80}")
