"""Reading a log: a part of it, its end, or everything that is appended, across rotations."""

import asyncio
import codecs
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import BinaryIO

from mlx_supervisor.control.backend import Fault, FaultCode

READ_LIMIT_BYTES = 1024 * 1024
"""Most bytes that one call returns; another call with a later offset reads the next ones."""
CHUNK_BYTES = 64 * 1024
FOLLOW_HEAD_BYTES = 1024
"""Bytes of existing text that `tail -f` begins with, as in Supervisord."""
POLL_INTERVAL_S = 0.2
TRUNCATED = "==> File truncated <==\n"


def read(path: Path | None, offset: int, length: int) -> str:
    """Supervisord's `readLog`: `length` bytes from `offset` (0: to the end), or the last `-offset` bytes.

    Raises Fault: NO_FILE, BAD_ARGUMENTS, FAILED.
    """
    if length < 0 or (offset < 0 and length):
        raise Fault(FaultCode.BAD_ARGUMENTS, f"offset {offset} with length {length}")
    try:
        with _open(path) as file:
            size = file.seek(0, os.SEEK_END)
            start = max(0, size - min(-offset, READ_LIMIT_BYTES)) if offset < 0 else offset
            file.seek(start)
            data = file.read(min(length or READ_LIMIT_BYTES, READ_LIMIT_BYTES))
    except OSError as error:
        raise Fault(FaultCode.FAILED, f"{path}: {error.strerror}") from error
    return decode_piece(data, cut=start > 0)[0]


def tail(path: Path | None, offset: int, length: int) -> tuple[str, int, bool]:
    """Supervisord's `tailProcessLog`: text from `offset`, the next offset, and whether text was skipped.

    If more than `length` bytes follow `offset`, the last `length` bytes are returned. A missing file counts as empty.
    Raises Fault: BAD_ARGUMENTS.
    """
    if offset < 0 or length < 0:
        raise Fault(FaultCode.BAD_ARGUMENTS, f"offset {offset} with length {length}")
    length = min(length, READ_LIMIT_BYTES)
    try:
        with _open(path) as file:
            size = file.seek(0, os.SEEK_END)
            overflow = size > offset + length
            start = size - length if overflow else min(offset, size)
            file.seek(start)
            data = file.read(length)
    except (Fault, OSError):
        return "", 0, False
    text, unfinished_bytes = decode_piece(data, cut=overflow)
    return text, start + len(data) - unfinished_bytes, overflow


def decode_piece(data: bytes, cut: bool) -> tuple[str, int]:
    """The text of a piece of UTF-8, and the number of bytes of an incomplete character dropped at its end.

    `cut`: the piece may begin inside a character, whose remaining bytes are dropped, too.
    """
    if cut:
        skip = 0
        while skip < min(3, len(data)) and data[skip] & 0xC0 == 0x80:
            skip += 1
        data = data[skip:]
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    return decoder.decode(data), len(decoder.getstate()[0])


def _open(path: Path | None) -> BinaryIO:
    if path is None:
        raise Fault(FaultCode.NO_FILE, "no log file")
    try:
        return path.open("rb")
    except FileNotFoundError:
        raise Fault(FaultCode.NO_FILE, str(path)) from None


class Follower:
    """Follows one log: whole characters only, across rotation by renaming or truncation."""

    def __init__(self, path: Path, from_end_bytes: int = FOLLOW_HEAD_BYTES) -> None:
        """Begins with the last `from_end_bytes` of the file. Raises Fault NO_FILE, OSError."""
        self._path = path
        self._file = _open(path)
        size = os.fstat(self._file.fileno()).st_size
        self._offset = max(0, size - from_end_bytes)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._skip_partial = self._offset > 0

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    async def texts(self) -> AsyncIterator[str]:
        """Endless pieces of text, each of at most `CHUNK_BYTES`. Raises OSError when the log cannot be read."""
        while True:
            text = self.poll()
            if text:
                yield text
            # yield even when the log never pauses: the daemon has other work on this event loop
            await asyncio.sleep(0 if text else POLL_INTERVAL_S)

    def poll(self) -> str:
        """New text, at most `CHUNK_BYTES`; "" if there is none."""
        if os.fstat(self._file.fileno()).st_size < self._offset:
            self._restart()
            return TRUNCATED
        text = self._next()
        if text or not self._was_replaced():
            return text
        return self._next() or self._reopen()  # first what was written between the last read and the rotation

    def _reopen(self) -> str:
        try:
            replacement = self._path.open("rb")
        except FileNotFoundError:
            return ""
        self._file.close()
        self._file = replacement
        self._restart()
        return self._next()

    def _next(self) -> str:
        self._file.seek(self._offset)
        data = self._file.read(CHUNK_BYTES)
        self._offset += len(data)
        if self._skip_partial and data:
            self._skip_partial = False
            data = data.lstrip(bytes(range(0x80, 0xC0)))
        return self._decoder.decode(data)

    def _restart(self) -> None:
        self._offset = 0
        self._skip_partial = False
        self._decoder.reset()

    def _was_replaced(self) -> bool:
        try:
            there = self._path.stat()
        except FileNotFoundError:
            return False  # between two files of a rotation
        here = os.fstat(self._file.fileno())
        return (there.st_dev, there.st_ino) != (here.st_dev, here.st_ino)
