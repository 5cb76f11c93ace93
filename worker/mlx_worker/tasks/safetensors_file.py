"""Whether a safetensors file is whole, by its header: read before MLX is imported."""

import json
from pathlib import Path
from typing import Any

HEADER_LIMIT_BYTES = 100_000_000
"""As in the safetensors library."""
POINTER = b"version https://git-lfs"
"""How a Git LFS pointer begins."""


def check_safetensors(path: Path) -> str:
    """What is wrong with a safetensors file; "" if its header fits its size."""
    try:
        return _problem(path)
    except (OSError, KeyError, TypeError, IndexError, AttributeError) as error:  # the header may be any JSON
        return f"cannot be read: {type(error).__name__}: {error}"


def _problem(path: Path) -> str:
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(64)
        if start.startswith(POINTER):
            return "is a Git LFS pointer, not the weights: run `git lfs pull` in its repository"
        length = int.from_bytes(start[:8], "little")
        if len(start) < 8 or length > HEADER_LIMIT_BYTES:
            return f"is no safetensors file ({size:,} bytes)"
        if 8 + length > size:
            return f"is truncated: {size:,} bytes, and its header alone has {8 + length:,}; copy or download it again"
        file.seek(8)
        header = _json(file.read(length))
    if not isinstance(header, dict):
        return "is no safetensors file: its header is no JSON object"
    ends = [entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"]
    needed = 8 + length + max(ends, default=0)
    return "" if size >= needed else f"is truncated: {size:,} of {needed:,} bytes; copy or download it again"


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None
