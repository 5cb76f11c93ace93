"""A worker's last message on disk, in the run's folder: the supervisor reads it when it did not receive it."""

import os
from pathlib import Path

import msgspec

from mlx_supervisor.wire.messages import Bye

LAST_MESSAGE_FILE = "last-message.json"
LIMIT_BYTES = 256 * 1024
"""A longer file is refused unread."""


class LastMessage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`token`: of the worker that wrote it, as in its hello."""

    token: str
    message: Bye


def encoded(last: LastMessage) -> bytes:
    """The file's contents."""
    return msgspec.json.encode(last) + b"\n"


def read_last_message(folder: Path, run: str, generation: int, token: str) -> Bye | None:
    """The last message of this generation's worker; None if it wrote none, or the file can't be used."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        with os.fdopen(os.open(folder / LAST_MESSAGE_FILE, flags), "rb") as file:
            data = file.read(LIMIT_BYTES + 1)
        if len(data) > LIMIT_BYTES:
            return None
        last = msgspec.json.decode(data, type=LastMessage)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    found = (last.message.run, last.message.generation, last.token)
    return last.message if found == (run, generation, token) and token else None
