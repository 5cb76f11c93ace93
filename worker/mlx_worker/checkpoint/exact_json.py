"""JSON that keeps every float, NaN and infinities included, and refuses values that it cannot restore exactly."""

import json
import math
from typing import Any

_TAG = "$float"
_DEPTH_LIMIT = 64


def dumps(value: Any) -> bytes:
    """Valid JSON; tuples become lists. Raises TypeError or ValueError that names the key of an unsupported value."""
    return json.dumps(_tagged(value, "", 0), allow_nan=False).encode() + b"\n"


def loads(data: bytes) -> Any:
    """What `dumps` was given. Raises ValueError."""
    return json.loads(data, object_hook=_untagged)


def _tagged(value: Any, key: str, depth: int) -> Any:
    if depth > _DEPTH_LIMIT:
        raise ValueError(f"{key:.200}: nested deeper than {_DEPTH_LIMIT} levels")
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {_TAG: repr(value)}
    if isinstance(value, list | tuple):
        return [_tagged(item, f"{key}[{index}]", depth + 1) for index, item in enumerate(value)]
    if isinstance(value, dict):
        return {_checked(name, key): _tagged(item, f"{key}.{name}", depth + 1) for name, item in value.items()}
    raise TypeError(f"{key.lstrip('.') or 'the value'}: a {type(value).__name__} cannot be stored as JSON")


def _checked(name: Any, key: str) -> str:
    if not isinstance(name, str) or name == _TAG:
        raise TypeError(
            f"{key.lstrip('.') or 'the top level'}: key {name!r:.80} is not allowed (allowed: text other than {_TAG})"
        )
    return name


def _untagged(value: dict[str, Any]) -> Any:
    return float(value[_TAG]) if set(value) == {_TAG} else value
