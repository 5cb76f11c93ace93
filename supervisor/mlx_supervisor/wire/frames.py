"""Messages as msgpack frames. A frame from a peer is untrusted: whatever it holds, reading it raises only WireError."""

import reprlib
from functools import partial
from typing import Any, TypeVar, get_args

import msgpack
import msgspec

from mlx_supervisor.wire.fields import VERSION, WireError
from mlx_supervisor.wire.messages import Message, SupervisorMessage, WorkerMessage

FRAME_LIMIT_BYTES = 64 * 1024
"""A longer frame is refused unread."""
ITEMS_LIMIT = 256
"""Entries of one array or map; the largest of any message has 24."""

M = TypeVar("M", bound=Message)
_packer = msgpack.Packer(buf_size=4096)


def encode(message: Message) -> bytes:
    """The message as a msgpack map. Raises WireError when msgpack can't hold it or the frame is over the limit."""
    try:
        frame: bytes = _packer.pack(msgspec.to_builtins(message))
    except (ValueError, OverflowError) as error:  # half of a surrogate pair, an integer over 64 bits
        raise WireError("type", str(error)) from None
    _check_size(frame)
    return frame


def _check_size(frame: bytes) -> None:
    if len(frame) > FRAME_LIMIT_BYTES:
        raise WireError("oversized", f"{len(frame):,} bytes; allowed: at most {FRAME_LIMIT_BYTES:,}")


def _map_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a map names a key twice")
    return found


def _refuse_extension(code: int, data: bytes) -> None:
    raise ValueError(f"extension type {code}")


_unpack = partial(
    msgpack.unpackb,
    raw=False,
    strict_map_key=True,
    object_pairs_hook=_map_of,
    ext_hook=_refuse_extension,
    max_str_len=FRAME_LIMIT_BYTES,
    max_bin_len=FRAME_LIMIT_BYTES,
    max_array_len=ITEMS_LIMIT,
    max_map_len=ITEMS_LIMIT,
    max_ext_len=0,
)


def _tagged(union: Any) -> dict[object, Any]:
    return {kind.__struct_config__.tag: kind for kind in get_args(union)}


_worker_kinds, _supervisor_kinds = _tagged(WorkerMessage), _tagged(SupervisorMessage)


def decode_worker(frame: bytes) -> WorkerMessage:
    """The worker's message. Raises WireError."""
    message: WorkerMessage = _decode(frame, _worker_kinds)
    return message


def decode_supervisor(frame: bytes) -> SupervisorMessage:
    """The supervisor's message. Raises WireError."""
    message: SupervisorMessage = _decode(frame, _supervisor_kinds)
    return message


def _decode(frame: bytes, kinds: dict[object, Any]) -> Any:
    _check_size(frame)
    try:
        fields = _unpack(frame)
    except (ValueError, RecursionError, msgpack.UnpackException) as error:
        raise WireError("malformed", f"{error!s:.200}") from None
    if not isinstance(fields, dict):
        raise WireError("type", "the frame is not a map")
    version = fields.get("v")
    if type(version) is not int or version != VERSION:
        raise WireError("version", f"found {reprlib.repr(version)}, expected {VERSION}")
    tag = fields.get("type")
    kind = kinds.get(tag) if isinstance(tag, str) else None
    if kind is None:
        raise WireError("type", f"unknown message type {reprlib.repr(tag)}")
    try:
        return msgspec.convert(fields, kind, strict=True)
    except (msgspec.ValidationError, RecursionError) as error:
        raise WireError("type", f"{error!s:.500}") from None
