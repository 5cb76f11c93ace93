"""`lora_parameters.keys` against the modules that the model has."""

from typing import Any

import mlx.nn as nn

from mlx_worker.tasks.mlx_lm.config import LoraConfig
from mlx_worker.tasks.suggest import did_you_mean
from mlx_worker.words import listed

_SHOWN = 12


def check(config: LoraConfig, model: Any) -> None:
    """Raises RefusedError if no key names a module."""
    keys = config.values.lora_parameters.get("keys")
    if keys is not None and not (set(keys) & _all_names(model)):
        raise config.refuse("lora_parameters.keys", f"no module is named {_quoted(keys)}{_hint(keys, model)}")


def notes(config: LoraConfig, model: Any) -> list[str]:
    """A sentence about keys that name no module, though others do."""
    values = config.values
    keys = values.lora_parameters.get("keys") if values.fine_tune_type != "full" and values.lora_parameters else None
    missing = [key for key in keys or [] if key not in _all_names(model)]
    if not missing:
        return []
    text = f"lora_parameters.keys: no module is named {_quoted(missing)}"
    return [f"{config.path.name}: {text}{did_you_mean(missing[0], _names(model))}"]


def described(model: Any) -> str:
    """`the model has self_attn.q_proj, …`: what keys may name."""
    return f"the model has {listed(_names(model), _SHOWN)}"


def _hint(keys: list[str], model: Any) -> str:
    near = did_you_mean(keys[0], _names(model))
    return f"{near} {described(model)[0].upper()}{described(model)[1:]}" if near else f"; {described(model)}"


def _quoted(keys: list[str]) -> str:
    return listed([repr(key) for key in keys], 4)


def _names(model: Any) -> list[str]:
    """Modules of the layers that can be adapted, as keys name them, in the order in which they occur."""
    names: dict[str, None] = {}
    for layer in model.layers:
        names |= {name: None for name, module in reversed(layer.named_modules()) if _adaptable(module)}
    return list(names)


def _all_names(model: Any) -> set[str]:
    """Every name that mlx_lm compares with the keys: within a layer, or from the model's root."""
    names = {name for name, _ in model.named_modules()}
    return names.union(*({name for name, _ in layer.named_modules()} for layer in model.layers))


def _adaptable(module: Any) -> bool:
    kinds = (nn.Linear, nn.QuantizedLinear, nn.Embedding, nn.QuantizedEmbedding)
    return isinstance(module, kinds) or hasattr(module, "to_lora") or type(module).__name__.endswith("SwitchLinear")
