"""The model folder's files, checked before MLX is imported: missing, truncated, or not what their names say."""

import json
from pathlib import Path
from typing import Any

from mlx_worker.tasks.mlx_lm.config import LoraConfig
from mlx_worker.tasks.safetensors_file import POINTER, check_safetensors
from mlx_worker.words import listed

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json", "*.tiktoken", "*.model")
_OTHER_WEIGHTS = ("*.gguf", "pytorch_model*.bin", "*.pth", "*.npz", "*.safetensors")
PARSED_BYTES = 4 * 2**20
"""Tokenizers of 30 MiB exist: parsing them twice would cost every start half a second."""


def model_source(config: LoraConfig) -> str:
    """A local model folder, or a name that mlx_lm finds on the hub. Raises RefusedError."""
    name = config.values.model
    if not config.given.get("model"):
        raise config.refuse(
            "model",
            f"not set; mlx_lm would download its default, {name}. Set it to a model folder or a model on the hub "
            f"(model: {name} takes that one)",
        )
    folder = config.resolve(name)
    if folder.is_dir():
        _check_folder(config, folder)
        return str(folder)
    if folder.exists():
        raise config.refuse(
            "model", f"expected a folder with config.json and model*.safetensors, found the file {folder}"
        )
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise config.refuse("model", f"no such folder: {folder}")
    return str(name)


def _check_folder(config: LoraConfig, folder: Path) -> None:
    _check_description(config, folder)
    weights = sorted(folder.glob("model*.safetensors"))
    if not weights:
        found = sorted({path.name for pattern in _OTHER_WEIGHTS for path in folder.glob(pattern)})
        hint = (
            f"; found {', '.join(found[:4])}: mlx_lm.convert makes a model folder from a PyTorch model" if found else ""
        )
        raise config.refuse("model", f"expected a model folder, but {folder} has no model*.safetensors{hint}")
    _check_index(config, folder)
    for path in weights:
        if problem := check_safetensors(path):
            raise config.refuse("model", f"{path} {problem}")
    _check_tokenizer(config, folder)


def _check_description(config: LoraConfig, folder: Path) -> None:
    path = folder / "config.json"
    if not path.is_file():
        hint = ""
        if (folder / "adapter_config.json").is_file():
            hint = "; it holds adapters: name the model that they were trained on, and them as resume_adapter_file"
        raise config.refuse("model", f"expected a model folder, but {folder} has no config.json{hint}")
    description = _object(config, path)
    if not isinstance(description.get("model_type"), str) and "model_file" not in description:
        raise config.refuse("model", f"{path} has no model_type; is this a model's config.json?")


def _check_index(config: LoraConfig, folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    if not path.is_file():
        return
    shards = _object(config, path).get("weight_map", {})
    missing = sorted({shard for shard in shards.values() if not (folder / str(shard)).is_file()})
    if missing:
        text = f"{folder} lacks {listed(missing, 3)}, which {path.name} names; copy or download them again"
        raise config.refuse("model", text)


def _check_tokenizer(config: LoraConfig, folder: Path) -> None:
    found = [path for pattern in _TOKENIZERS for path in folder.glob(pattern)]
    if not found and not config.values.trust_remote_code:
        text = f"{folder} has no tokenizer (tokenizer.json or tokenizer.model); copy it from the original model"
        raise config.refuse("model", text)
    for name in ("tokenizer_config.json", "tokenizer.json"):
        path = folder / name
        if path.is_file() and path.stat().st_size < PARSED_BYTES:  # transformers reads it later
            _object(config, path, "the tokenizer's file ")


def _object(config: LoraConfig, path: Path, what: str = "") -> dict[str, Any]:
    """A JSON file's object."""
    data = path.read_bytes()
    if data.startswith(POINTER):
        text = f"{what}{path} is a Git LFS pointer: run `git lfs pull` in its repository"
        raise config.refuse("model", text)
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise config.refuse("model", f"{what}{path} is no valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise config.refuse("model", f"{what}{path}: expected a JSON object, found {type(value).__name__}")
    return value
