"""What a run trains on, identified by content: base weights, tokenizer, frozen parameters. Paths mean nothing."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import mlx.core as mx

from mlx_worker.checkpoint import durable_files
from mlx_worker.checkpoint.store import bits_of
from mlx_worker.tasks.safetensors_file import HEADER_LIMIT_BYTES

WHOLE_BYTES = 16 * 2**20
"""Smaller files are hashed completely."""
SAMPLE_BYTES = 4096
"""Read from the start and from the middle of every tensor of a larger file: training, merging and quantizing change
most tensors, and 100 GB in 5,000 tensors cost 10,000 reads."""
TENSORS_AT_MOST = 8192
"""Per file; of more, evenly spaced ones are sampled."""
CACHE_LIMIT = 256
CACHE_NAME = "fingerprints.json"
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json"),
)


def of_weights(folder: Path, cache: Path) -> str:
    """SHA-256 over the contents of `model*.safetensors`, whatever their names; "" without any. Raises OSError.

    `cache`: a file with the digests of files whose path, size, and times of change are unchanged.
    """
    files = sorted(folder.glob("model*.safetensors"))
    known = _load(cache)
    used = {_key(path): known.get(_key(path)) or of_file(path) for path in files}
    if used and not used.items() <= known.items():
        _store(cache, known | used)
    return hashlib.sha256("".join(sorted(used.values())).encode()).hexdigest() if used else ""


def of_file(path: Path) -> str:
    """SHA-256 of the size, then of all bytes, or of the header and of samples of each tensor. Raises OSError."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest = hashlib.sha256(f"{size}\n".encode())
        if size <= WHOLE_BYTES:
            while chunk := file.read(2**20):
                digest.update(chunk)
        else:
            for offset, length in _samples(file, size, digest):
                file.seek(offset)
                digest.update(file.read(length))
    return digest.hexdigest()


def _samples(file: BinaryIO, size: int, digest: Any) -> Iterable[tuple[int, int]]:
    """Hash the header, and return where to read. A file that is no safetensors gets 8,192 evenly spaced samples."""
    start = file.read(8)
    length = int.from_bytes(start, "little")
    header = file.read(length) if length <= min(size, HEADER_LIMIT_BYTES) else b""
    digest.update(start + header)
    ends: list[tuple[int, int]] = []
    with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError, RecursionError):
        tensors = [each for name, each in json.loads(header).items() if name != "__metadata__"]
        pairs = [[8 + length + int(offset) for offset in each["data_offsets"]] for each in tensors]
        ends = sorted((begin, end) for begin, end in pairs)
    if not ends:
        ends = [(size * i // TENSORS_AT_MOST, size * (i + 1) // TENSORS_AT_MOST) for i in range(TENSORS_AT_MOST)]
    for begin, end in ends[:: -(-len(ends) // TENSORS_AT_MOST)]:
        for offset in (begin, (begin + end) // 2):
            if 0 <= offset < min(end, size):
                yield offset, min(SAMPLE_BYTES, end - offset)


def of_tokenizer(folder: Path) -> dict[str, str]:
    """SHA-256 of each file of the tokenizer, by name. Raises OSError."""
    found = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def of_arrays(arrays: Mapping[str, mx.array]) -> str:
    """SHA-256 over names, types, shapes, and the first and the middle 4 KiB of each array; "" without any."""
    if not arrays:
        return ""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(json.dumps([name, str(array.dtype), list(array.shape)]).encode() + b"\n")
        flat, count = array.reshape(-1), SAMPLE_BYTES // array.dtype.size
        for begin in sorted({0, flat.size // 2}):
            digest.update(bits_of(flat[begin : begin + count]).tobytes())
    return digest.hexdigest()


def _key(path: Path) -> str:
    status = path.stat()
    return json.dumps([str(path.resolve()), status.st_size, status.st_mtime_ns, status.st_ctime_ns])


def _load(cache: Path) -> dict[str, str]:
    with contextlib.suppress(OSError, ValueError, RecursionError):
        content = json.loads(cache.read_bytes())
        if isinstance(content, dict) and all(isinstance(value, str) for value in content.values()):
            return content
    return {}


def _store(cache: Path, digests: dict[str, str]) -> None:
    """The newest ones. A cache that can't be written costs the next start some seconds."""
    newest = json.dumps(dict(list(digests.items())[-CACHE_LIMIT:]), indent=1).encode()
    with contextlib.suppress(OSError):
        durable_files.replace_file(cache, lambda file: file.write(newest))
