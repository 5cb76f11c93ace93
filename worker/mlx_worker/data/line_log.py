"""A text file to which whole lines are appended, on a disk that may fail."""

import contextlib
import errno
import json
import os
import time
from collections import deque
from pathlib import Path

MODE = 0o600
LIMIT_BYTES = 16 * 1024 * 1024
"""Of the lines that wait in memory for the disk."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0
"""Between two attempts to write; the pause doubles from the first to the longest."""
_TAIL_BYTES = 64 * 1024


class LineLog:
    """Appends to `path`. What the disk refuses waits in memory, at most `LIMIT_BYTES`, and is written later, in order.

    A line of which the disk took only a part is continued where it stopped. The torn line of a process that died is
    completed or cut off when the file is opened. A deleted file is made again. Never raises OSError.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.error = ""
        """Why the latest attempt failed; "" if everything is written."""
        self._descriptor = -1
        self._lines: deque[bytes] = deque()
        self._bytes = self._written = 0  # of all waiting lines; of the first one, in the file already
        self._pause_s, self._next_s = FIRST_PAUSE_S, float("-inf")
        self.flush()

    def write(self, line: str) -> bool:
        """Append a line (without its end). False: too many lines wait, this one is dropped."""
        data = line.encode() + b"\n"
        if self._bytes + len(data) > LIMIT_BYTES:
            self.flush()
            if self._bytes + len(data) > LIMIT_BYTES:
                return False
        self._lines.append(data)
        self._bytes += len(data)
        if time.monotonic() >= self._next_s:
            self.flush()
        return True

    def flush(self) -> bool:
        """Try to write the waiting lines now. Whether all are written."""
        try:
            self._open()
            while self._lines:
                self._write_first()
        except OSError as error:
            self.error = f"{error.strerror or error} ({errno.errorcode.get(error.errno or 0, 'unknown error')})"
            self._next_s = time.monotonic() + self._pause_s
            self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
            return False
        self.error, self._pause_s, self._next_s = "", FIRST_PAUSE_S, float("-inf")
        return True

    def close(self) -> list[str]:
        """Try a last time, then close. Returns the lines that could not be written."""
        self.flush()
        if self._written:  # a part of the first line is in the file
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, os.fstat(self._descriptor).st_size - self._written)
        self._close()
        return [line.decode().rstrip("\n") for line in self._lines]

    @property
    def waiting(self) -> int:
        """Lines that wait for the disk."""
        return len(self._lines)

    def _write_first(self) -> None:
        line = self._lines[0]
        while self._written < len(line):
            count = os.write(self._descriptor, memoryview(line)[self._written :])
            if count == 0:
                raise OSError("the device accepted no bytes")
            self._written += count
        self._bytes -= len(self._lines.popleft())
        self._written = 0

    def _open(self) -> None:
        if self._descriptor >= 0 and os.fstat(self._descriptor).st_nlink > 0:
            return
        self._close()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        descriptor = os.open(self.path, flags, MODE)
        try:
            self._repair(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor

    def _close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor, self._written = -1, 0

    def _repair(self, descriptor: int) -> None:
        """End the file with a whole line: complete one that lacks only its end, cut off a torn one."""
        end = os.fstat(descriptor).st_size
        tail, start = b"", end
        while start > 0 and b"\n" not in tail:
            size = min(_TAIL_BYTES, start)
            start -= size
            tail = os.pread(descriptor, size, start) + tail
        last = tail.rpartition(b"\n")[2]
        if not last:
            return
        try:
            json.loads(last)
        except ValueError:
            os.ftruncate(descriptor, end - len(last))
        else:
            os.write(descriptor, b"\n")
