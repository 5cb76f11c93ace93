"""Writes the worker's last message to the run's folder, in case the supervisor does not receive it."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

from mlx_supervisor import wire
from mlx_supervisor.wire.last_message import LAST_MESSAGE_FILE, LastMessage, encoded
from mlx_worker.checkpoint.durable_files import Files, write_file


def writer(folder: Path) -> Callable[[wire.Bye], None]:
    """Returns what writes a last message to `folder`, atomically and flushed. Errors of the disk are ignored: the
    message is sent as well."""

    def write(message: wire.Bye) -> None:
        token = os.environ.get(wire.TOKEN_VARIABLE, "")
        with contextlib.suppress(OSError):
            _write(folder, encoded(LastMessage(token, message)))

    return write


def _write(folder: Path, data: bytes) -> None:
    files, path = Files(), folder / LAST_MESSAGE_FILE
    temporary = path.with_name(f".{path.name}.tmp")
    with contextlib.suppress(FileNotFoundError):
        files.delete_file(temporary)
    try:
        write_file(temporary, lambda file: file.write(data), files)
        files.rename(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            files.delete_file(temporary)
        raise
    files.flush_folder(folder)
