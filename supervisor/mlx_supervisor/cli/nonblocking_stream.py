"""Console output, written by a thread: a closed terminal or an unread pipe never blocks a run."""

import os
import threading
from collections import deque
from typing import TextIO

WAITING_LIMIT_CHARS = 256 * 1024
"""Text that may wait for a slow reader; more is dropped, and the number of dropped writes is shown later."""


class NonblockingStream:
    """A text stream for rich to write to. `write` neither blocks nor raises.

    After `settle`, it blocks as long as the reader does: for the summary after a run.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self._texts: deque[str] = deque()
        self._chars = 0
        self._dropped = 0
        self._settling = False
        self._closed = stream is None
        self._changed = threading.Condition()
        if stream is not None:
            threading.Thread(target=self._work, args=(stream,), name="display", daemon=True).start()

    @property
    def encoding(self) -> str:
        """Of the wrapped stream."""
        return getattr(self._stream, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        """Of the wrapped stream."""
        try:
            return self._stream is not None and self._stream.isatty()
        except (OSError, ValueError):
            return False

    def fileno(self) -> int:
        """Of the wrapped stream. Raises OSError when there is none."""
        if self._stream is None:
            raise OSError("no stream")
        return self._stream.fileno()

    def write(self, text: str) -> int:
        """Queue the text; drop it when too much is waiting or the reader has closed the stream."""
        with self._changed:
            if self._settling:
                self._changed.wait_for(lambda: self._closed or self._chars < WAITING_LIMIT_CHARS)
            if self._closed:
                return len(text)
            if self._chars >= WAITING_LIMIT_CHARS:
                self._dropped += 1
                return len(text)
            if self._dropped:
                text = f"({self._dropped} writes dropped: the output was not read)\n{text}"
                self._dropped = 0
            self._texts.append(text)
            self._chars += len(text)
            self._changed.notify_all()
        return len(text)

    def flush(self) -> None:
        """Once settled: block until all is written. Before that: do nothing."""
        with self._changed:
            if self._settling:
                self._changed.wait_for(lambda: self._closed or self._chars == 0)

    def settle(self) -> None:
        """From now on, wait for the reader."""
        self._settling = True

    def _work(self, stream: TextIO) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._texts)
                text = self._texts.popleft()
            try:
                _write(stream, text.encode(self.encoding, "replace"))
            except (OSError, ValueError):
                self._closed = True
            with self._changed:
                self._chars -= len(text)
                self._changed.notify_all()
                if self._closed:
                    return


def _write(stream: TextIO, data: bytes) -> None:
    """Bypass the stream's own buffer: a blocked thread would hold its lock until the interpreter exits."""
    while data:
        data = data[os.write(stream.fileno(), data) :]
