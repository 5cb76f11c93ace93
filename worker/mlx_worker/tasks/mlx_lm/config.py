"""The unchanged YAML file of `mlx_lm.lora`, with mlx_lm's own defaults, checked before MLX is imported."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

from mlx_worker.errors import RefusedError
from mlx_worker.tasks.mlx_lm.defaults import config_defaults
from mlx_worker.tasks.mlx_lm.optimizing import check_optimizer, check_schedule, is_number
from mlx_worker.tasks.mlx_lm.yaml_file import read_yaml
from mlx_worker.tasks.suggest import or_list

FINE_TUNE_TYPES = ("lora", "dora", "full")
_AT_LEAST = {
    "num_layers": -1, "batch_size": 1, "iters": 1, "val_batches": -1, "steps_per_report": 0, "steps_per_eval": 1,
    "save_every": 0, "test_batches": -1, "max_seq_length": 2, "grad_accumulation_steps": 1, "seed": 0,
}  # fmt: skip
LARGEST = 2**32 - 1
"""Of a whole number: numpy takes no larger seed."""
_BOOLEANS = {"train", "test", "mask_prompt", "grad_checkpoint", "trust_remote_code"}
FEATURES = {"prompt_feature", "completion_feature", "chat_feature", "text_feature"}
"""Keys that choose what of the data is trained on."""
_STRINGS = {
    "model", "data", "fine_tune_type", "optimizer", "resume_adapter_file", "adapter_path", "report_to", "project_name",
} | FEATURES  # fmt: skip
_MAPPINGS = {"optimizer_config", "lora_parameters", "lr_schedule"}
_NUMBERS = {"learning_rate", "clear_cache_threshold"}
_REFUSED = {"config": "a configuration file cannot include another"}
OPTIONS = {*_AT_LEAST, *_BOOLEANS, *_STRINGS, *_MAPPINGS, *_NUMBERS, *_REFUSED, "hf_dataset"}
"""Every known option of mlx_lm.lora, supported or refused with a reason. docs/mlx-lm.md describes each."""
_LORA = ("rank", "scale", "dropout", "keys")
_IGNORED_LORA = "alpha"
"""In older files of mlx_lm beside `scale`; mlx_lm reads only that."""
_HUB = ("path", "config", "train_split", "valid_split", "test_split", *sorted(FEATURES), "mask_prompt")
ELSEWHERE = {
    **dict.fromkeys(("epochs", "num_epochs", "num_train_epochs"), "iters (one epoch: samples / batch_size)"),
    **dict.fromkeys(("steps", "max_steps", "iterations", "num_steps"), "iters"),
    **dict.fromkeys(("per_device_train_batch_size", "micro_batch_size"), "batch_size"),
    **dict.fromkeys(("rank", "r", "lora_rank"), "lora_parameters.rank"),
    **dict.fromkeys(("alpha", "lora_alpha", "scale", "lora_scale"), "lora_parameters.scale (alpha / rank)"),
    **dict.fromkeys(("dropout", "lora_dropout"), "lora_parameters.dropout"),
    **dict.fromkeys(("keys", "target_modules", "lora_keys"), "lora_parameters.keys"),
    **dict.fromkeys(("warmup", "warmup_steps"), "lr_schedule.warmup"),
    **dict.fromkeys(("weight_decay", "betas", "eps", "momentum"), "optimizer_config, by optimizer"),
    **dict.fromkeys(("scheduler", "lr_scheduler", "lr_scheduler_type"), "lr_schedule"),
    **dict.fromkeys(("dataset", "train_file", "data_path"), "data"),
    **dict.fromkeys(("max_length", "max_len", "seq_len", "context_length", "block_size"), "max_seq_length"),
    **dict.fromkeys(("output_dir", "adapter_file", "save_path"), "adapter_path"),
    **dict.fromkeys(("model_name", "model_path", "base_model", "model_name_or_path"), "model"),
    "lora_layers": "num_layers",
    "lr": "learning_rate",
    "gradient_accumulation_steps": "grad_accumulation_steps",
    "gradient_checkpointing": "grad_checkpoint",
    "eval_steps": "steps_per_eval",
    "logging_steps": "steps_per_report",
    "save_steps": "save_every",
    "use_dora": "fine_tune_type: dora",
}
"""What users of other trainers, or of an older mlx_lm, look for."""


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
            origin = self._absent(first)
        return RefusedError(f"{self.path}: {key}: {text}" if origin is None else f"{origin}{dot}{rest}: {text}")

    def _absent(self, key: str) -> str:
        """Where an option that was not set would be: beside one of the settings file, or on the command line."""
        beside = next((origin for origin in self.origins.values() if not origin.startswith("--")), None)
        return f"--{key.replace('_', '-')}" if beside is None else f"{beside.rpartition('.')[0]}.{key}"

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
    given = (read_yaml(path) if config else {}) | dict(options)
    defaults = config_defaults()
    values = defaults | {key: value for key, value in given.items() if value is not None}
    result = LoraConfig(path, SimpleNamespace(**values), given, Path(base_dir), origins, bool(config))
    problems = []
    for key, value in given.items():
        try:
            if value is not None:
                _check_key(result, key, value, defaults)
        except RefusedError as error:
            problems.append(str(error))
    if problems:
        others = "; ".join(problem.removeprefix(f"{path}: ") for problem in problems[1:])
        raise RefusedError(problems[0] + (f" Also: {others}" if others else ""))
    _check_together(result)
    result.values.train = True  # mlx_lm's loaders read it
    return result


def _check_key(config: LoraConfig, key: str, value: Any, defaults: Mapping[str, Any]) -> None:
    if key not in OPTIONS:
        if key in defaults:
            raise config.refuse(key, "this mlx_lm.lora option is newer than mlx-supervisor and not supported yet")
        raise config.refuse(key, f"unknown key{_suggestion(key)}")
    if key in _REFUSED:
        if value:
            raise config.refuse(key, f"not supported: {_REFUSED[key]}")
    elif key == "hf_dataset":
        _check_hub(config, value)
    elif key in _AT_LEAST:
        if not isinstance(value, int) or isinstance(value, bool) or not _AT_LEAST[key] <= value <= LARGEST:
            most = f" and at most {LARGEST}" if isinstance(value, int) and value > LARGEST else ""
            text = f"expected a whole number of at least {_AT_LEAST[key]}{most}, found {value!r:.80}"
            raise config.refuse(key, text + _quoted(value))
    elif key in _NUMBERS:
        if not is_number(value) or value < 0:
            raise config.refuse(key, f"expected a number of at least 0, found {value!r:.80}{_quoted(value)}")
    else:
        _check_kind(config, key, value)


def _suggestion(key: str) -> str:
    elsewhere = ELSEWHERE.get(key.lower().replace("-", "_"))
    if elsewhere is not None:
        return f"; in mlx_lm this is {elsewhere}"
    return or_list(key, sorted(OPTIONS - set(_REFUSED)))


def _quoted(value: Any) -> str:
    try:
        number = isinstance(value, str) and math.isfinite(float(value))
    except ValueError:
        number = False
    return "; write it without quotes" if number else ""


def _check_kind(config: LoraConfig, key: str, value: Any) -> None:
    for kind, keys in {bool: _BOOLEANS, str: _STRINGS, dict: _MAPPINGS}.items():
        if key in keys and not isinstance(value, kind):
            raise config.refuse(key, f"expected {_NAMES[kind]}, found {value!r:.80}")
    if key in ("model", "data", "adapter_path") and not value.strip():
        raise config.refuse(key, "expected text, found an empty one")


def _check_hub(config: LoraConfig, value: Any) -> None:
    for dataset in value if isinstance(value, list) and value else [value]:
        if not isinstance(dataset, dict) or not isinstance(dataset.get("path"), str):
            raise config.refuse("hf_dataset", f"expected a mapping with a path, or a list of them, found {value!r:.80}")
        for key in dataset:
            if key not in _HUB:
                raise config.refuse(f"hf_dataset.{key}", f"unknown key{or_list(key, _HUB, 'hf_dataset.')}")
        if not isinstance(dataset.get("config", {}), dict):
            text = f"expected a mapping of arguments of datasets.load_dataset, found {dataset['config']!r:.80}"
            raise config.refuse("hf_dataset.config", text)
        if config.values.test is True and not dataset.get("test_split"):
            raise config.refuse("hf_dataset.test_split", "not set; test: true needs it (test_split: test)")


_NAMES: dict[type, str] = {bool: "true or false", str: "text", dict: "a mapping"}


def _check_together(config: LoraConfig) -> None:
    values = config.values
    optimizer, accumulation, schedule = values.optimizer.lower(), values.grad_accumulation_steps, values.lr_schedule
    if config.given.get("train") is False:
        raise config.refuse("train", "must be true, found false; to test finished adapters, use mlx_lm.lora --test")
    if values.fine_tune_type not in FINE_TUNE_TYPES:
        hint = "; a quantized model with fine_tune_type: lora is QLoRA" if values.fine_tune_type == "qlora" else ""
        text = f"allowed: {', '.join(FINE_TUNE_TYPES)}; found {values.fine_tune_type!r}{hint}"
        raise config.refuse("fine_tune_type", text)
    check_optimizer(optimizer, values.optimizer_config, config.refuse)
    if values.fine_tune_type != "full":
        _check_lora(config)
    if schedule:
        check_schedule(schedule, config.refuse)
    if accumulation > values.iters:
        raise config.refuse(
            "iters", f"expected at least grad_accumulation_steps ({accumulation}), found {values.iters}"
        )


def _check_lora(config: LoraConfig) -> None:
    given = config.values.lora_parameters
    for key in given:
        if key not in _LORA and not (key == _IGNORED_LORA and "scale" in given):
            near = "; use scale (alpha / rank)" if key == _IGNORED_LORA else or_list(key, _LORA, "lora_parameters.")
            raise config.refuse(f"lora_parameters.{key}", f"unknown key{near}")
    for key, default, kinds, in_range, allowed in (
        ("rank", 8, int, lambda value: value >= 1, "a whole number of at least 1"),
        ("scale", 20.0, (int, float), math.isfinite, "a number"),
        ("dropout", 0.0, (int, float), lambda value: 0 <= value < 1, "a number of at least 0 and less than 1"),
    ):
        value = given.get(key)
        if not isinstance(value, kinds) or isinstance(value, bool) or not in_range(value):
            found = f"{value!r:.80}{_quoted(value)}" if key in given else f"nothing (mlx_lm's default: {default})"
            raise config.refuse(f"lora_parameters.{key}", f"expected {allowed}, found {found}")
    keys = given.get("keys")
    if keys is not None and not (isinstance(keys, list) and keys and all(isinstance(key, str) for key in keys)):
        text = f"expected a list of module names such as [self_attn.q_proj], found {keys!r:.80}"
        raise config.refuse("lora_parameters.keys", text)
