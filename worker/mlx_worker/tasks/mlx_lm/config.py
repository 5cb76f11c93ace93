"""The YAML file of `mlx_lm.lora`, read as it is, with mlx_lm's own defaults, and checked before anything is loaded."""

import copy
import os
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
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
_REFUSED = {"config": "a configuration file cannot name another"}
OPTIONS = {*_AT_LEAST, *_BOOLEANS, *_STRINGS, *_MAPPINGS, *_NUMBERS, *_REFUSED, "hf_dataset"}
"""Every option of mlx_lm.lora that is known here: honoured, or refused with the reason. docs/mlx-lm.md tells each."""


@dataclass(frozen=True)
class LoraConfig:
    """The values, as mlx_lm's functions want them, and the file they came from. `given`: what the file itself says."""

    path: Path
    values: SimpleNamespace
    given: dict[str, Any]
    base_dir: Path

    def refuse(self, key: str, text: str) -> RefusedError:
        """An error that names the file and the key."""
        return RefusedError(f"{self.path}: {key}: {text}")

    def resolve(self, name: str) -> Path:
        """A path of the file: from its own folder if it exists there, else from the settings' folder."""
        beside = self.path.parent / Path(name).expanduser()
        return beside if beside.exists() else self.base_dir / Path(name).expanduser()


def load(config: str | None, base_dir: str) -> LoraConfig:
    """Read and check. Raises RefusedError that names the file, the key, what was found and what is allowed."""
    if not config:
        raise RefusedError("task.config is missing: an mlx_lm task needs the YAML file of mlx_lm.lora")
    path = Path(os.path.normpath(Path(base_dir) / Path(config).expanduser()))
    given = _read(path)
    values = copy.deepcopy(CONFIG_DEFAULTS) | {key: value for key, value in given.items() if value is not None}
    result = LoraConfig(path, SimpleNamespace(**values), given, Path(base_dir))
    for key, value in given.items():
        if value is not None:
            _check_key(result, key, value)
    _check_together(result)
    result.values.train = True  # that is what the run is for; mlx_lm's loaders ask
    return result


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open(encoding="utf-8") as file:
            given = yaml.load(file, yaml_loader)  # noqa: S506 - a SafeLoader, with mlx_lm's notation for floats
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise RefusedError(f"{path}{line}: not YAML: {getattr(error, 'problem', None) or error}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RefusedError(f"{path}: task.config cannot be read: {error}") from None
    if not isinstance(given, dict) or not all(isinstance(key, str) for key in given):
        raise RefusedError(f"{path}: expected a mapping of names to values, found {type(given).__name__}")
    return given


def _check_key(config: LoraConfig, key: str, value: Any) -> None:
    if key not in OPTIONS:
        if key in CONFIG_DEFAULTS:
            raise config.refuse(key, "this option of mlx_lm.lora is newer than mlx-supervisor, which does not know it")
        raise config.refuse(key, "unknown key; allowed are " + ", ".join(sorted(OPTIONS - set(_REFUSED))))
    if key in _REFUSED:
        if value:
            raise config.refuse(key, f"is not supported here: {_REFUSED[key]}")
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
    if config.given.get("train") is False:
        raise config.refuse("train", "is false, so there is nothing to do; mlx_lm.lora --test tests finished adapters")
    if values.fine_tune_type not in FINE_TUNE_TYPES:
        raise config.refuse("fine_tune_type", f"allowed are {_list(FINE_TUNE_TYPES)}, found {values.fine_tune_type!r}")
    if values.optimizer.lower() not in OPTIMIZERS:
        raise config.refuse("optimizer", f"allowed are {_list(OPTIMIZERS)}, found {values.optimizer!r}")
    if not isinstance(values.optimizer_config.get(values.optimizer.lower(), {}) or {}, dict):
        raise config.refuse(f"optimizer_config.{values.optimizer.lower()}", "expected a mapping")
    if values.fine_tune_type != "full":
        _check_lora(config)
    if values.lr_schedule is not None and not {"name", "arguments"} <= set(values.lr_schedule):
        raise config.refuse("lr_schedule", "needs the keys name and arguments")
    if values.grad_accumulation_steps > values.iters:
        raise config.refuse(
            "iters", f"{values.iters} is less than one update of {values.grad_accumulation_steps} accumulation steps"
        )


def _check_lora(config: LoraConfig) -> None:
    parameters = config.values.lora_parameters
    for key, kinds, allowed in (
        ("rank", int, "a whole number of at least 1"),
        ("scale", (int, float), "a number"),
        ("dropout", (int, float), "a number from 0 to 1"),
    ):
        value = parameters.get(key)
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise config.refuse(f"lora_parameters.{key}", f"expected {allowed}, found {value!r:.80}")
    if parameters["rank"] < 1:
        raise config.refuse("lora_parameters.rank", f"expected at least 1, found {parameters['rank']}")
    dropout = parameters["dropout"]
    if not 0 <= dropout < 1:
        raise config.refuse("lora_parameters.dropout", f"expected 0 or more, less than 1, found {dropout}")


def _list(names: tuple[str, ...]) -> str:
    return ", ".join(names)
