"""The defaults of `mlx_lm.lora`, read from its source: importing it takes a second, and a refusal should not."""

import ast
import copy
import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

from mlx_worker.errors import RefusedError


def config_defaults() -> dict[str, Any]:
    """`mlx_lm.lora.CONFIG_DEFAULTS`, a copy. Raises RefusedError if mlx_lm is not installed."""
    if "mlx_lm.lora" not in sys.modules:
        found = _from_source()
        if found is not None:
            return found
    module = importlib.import_module("mlx_lm.lora")
    return copy.deepcopy(dict(module.CONFIG_DEFAULTS))


def _from_source() -> dict[str, Any] | None:
    spec = importlib.util.find_spec("mlx_lm")
    if spec is None or not spec.submodule_search_locations:
        raise RefusedError(f"the package mlx-lm is not installed in {sys.prefix} (pip install mlx-lm)")
    try:
        tree = ast.parse((Path(spec.submodule_search_locations[0]) / "lora.py").read_text(encoding="utf-8"))
        for node in tree.body:
            if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["CONFIG_DEFAULTS"]:
                found: dict[str, Any] = ast.literal_eval(node.value)
                return found
    except (OSError, SyntaxError, ValueError):
        return None
    return None
