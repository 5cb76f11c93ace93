"""State that the task's own code keeps, as JSON and arrays: no pickle."""

import base64
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_worker.checkpoint import exact_json
from mlx_worker.errors import RefusedError

JSON_LIMIT_BYTES = 1024 * 1024
ARRAYS_LIMIT_BYTES = 2**30
ARRAYS_LIMIT = 4096
ALLOWED = "None, bool, int, float, str, bytes, lists, tuples, dicts with text keys, numpy scalars, and mx.array"
_ARRAY, _BYTES = "$array", "$bytes"
_DEPTH_LIMIT = 32


@dataclass(frozen=True)
class MoreState:
    """What a checkpoint has besides weights and optimizer: arrays by file and name, and keys for `trainer.json`."""

    arrays: Mapping[str, Mapping[str, mx.array]] = field(default_factory=dict)
    trainer: Mapping[str, Any] = field(default_factory=dict)

    @property
    def size_bytes(self) -> int:
        """Of the arrays."""
        return sum(array.nbytes for named in self.arrays.values() for array in named.values())


def encode(value: Any, where: str) -> tuple[Any, dict[str, mx.array]]:
    """The value ready for JSON, and its arrays by number. `where`: "Task.state". Tuples become lists,
    numpy's scalars Python's.

    Raises RefusedError that names the item of another type, or the limit that the value exceeds.
    """
    arrays: dict[str, mx.array] = {}
    plain = _plain(value, where, arrays, 0)
    size_bytes = len(exact_json.dumps(plain))
    if size_bytes > JSON_LIMIT_BYTES:
        raise RefusedError(f"{where}: {size_bytes:,} bytes as JSON, allowed: at most {JSON_LIMIT_BYTES:,}")
    arrays_bytes = sum(array.nbytes for array in arrays.values())
    if len(arrays) > ARRAYS_LIMIT or arrays_bytes > ARRAYS_LIMIT_BYTES:
        found = f"{len(arrays):,} arrays of {arrays_bytes / 2**20:,.0f} MiB"
        allowed = f"at most {ARRAYS_LIMIT:,} arrays of {ARRAYS_LIMIT_BYTES / 2**20:,.0f} MiB"
        raise RefusedError(f"{where}: {found}, allowed: {allowed}")
    return plain, arrays


def decode(plain: Any, arrays: Mapping[str, mx.array]) -> Any:
    """What `encode` was given. Raises KeyError or ValueError for other input."""
    if isinstance(plain, list):
        return [decode(item, arrays) for item in plain]
    if not isinstance(plain, dict):
        return plain
    if set(plain) == {_ARRAY}:
        return arrays[plain[_ARRAY]]
    if set(plain) == {_BYTES}:
        return base64.b64decode(plain[_BYTES], validate=True)
    return {name: decode(item, arrays) for name, item in plain.items()}


def _plain(value: Any, where: str, arrays: dict[str, mx.array], depth: int) -> Any:
    if depth > _DEPTH_LIMIT:
        raise RefusedError(f"{where[:200]}: nested deeper than {_DEPTH_LIMIT} levels")
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, mx.array):
        name = str(len(arrays))
        arrays[name] = value
        return {_ARRAY: name}
    if isinstance(value, bytes):
        return {_BYTES: base64.b64encode(value).decode()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{index}]", arrays, depth + 1) for index, item in enumerate(value)]
    if isinstance(value, Mapping):
        for name in value:
            if not isinstance(name, str) or name.startswith("$"):
                raise RefusedError(
                    f"{where}: key {name!r:.80} is not allowed (allowed: text that does not begin with $)"
                )
        return {name: _plain(item, f"{where}[{name!r}]", arrays, depth + 1) for name, item in value.items()}
    kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
    raise RefusedError(f"{where}: found {kind}, allowed: {ALLOWED}")
