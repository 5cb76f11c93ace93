"""What people are shown, written by a thread: no closed terminal and no pipe that nobody reads holds up a run."""

import os
import threading
from collections import deque
from typing import TextIO

WAITING_LIMIT_CHARS = 256 * 1024
"""What may wait for a reader; what comes after is dropped, and said."""


class PatientStream:
    """Stands in for a text stream where rich wants to write. `write` neither blocks nor raises.

    After `settle` it blocks as long as the reader does: for the words after a run, when nothing can be held up.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self._texts: deque[str] = deque()
        self._chars = 0
        self._dropped = 0
        self._settling = False
        self._gone = stream is None
        self._changed = threading.Condition()
        if stream is not None:
            threading.Thread(target=self._work, args=(stream,), name="display", daemon=True).start()

    @property
    def encoding(self) -> str:
        """Of the stream behind."""
        return getattr(self._stream, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        """Of the stream behind."""
        try:
            return self._stream is not None and self._stream.isatty()
        except (OSError, ValueError):
            return False

    def fileno(self) -> int:
        """Of the stream behind. Raises OSError when there is none."""
        if self._stream is None:
            raise OSError("no stream")
        return self._stream.fileno()

    def write(self, text: str) -> int:
        """Have it written, unless too much waits already or the reader is gone."""
        with self._changed:
            if self._settling:
                self._changed.wait_for(lambda: self._gone or self._chars < WAITING_LIMIT_CHARS)
            if self._gone:
                return len(text)
            if self._chars >= WAITING_LIMIT_CHARS:
                self._dropped += 1
                return len(text)
            if self._dropped:
                text = f"({self._dropped} writes left out: nobody read)\n{text}"
                self._dropped = 0
            self._texts.append(text)
            self._chars += len(text)
            self._changed.notify_all()
        return len(text)

    def flush(self) -> None:
        """Until all is written, once settled; before that, nothing."""
        with self._changed:
            if self._settling:
                self._changed.wait_for(lambda: self._gone or self._chars == 0)

    def settle(self) -> None:
        """Wait for the reader from now on."""
        self._settling = True

    def _work(self, stream: TextIO) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._texts)
                text = self._texts.popleft()
            try:
                _write(stream, text.encode(self.encoding, "replace"))
            except (OSError, ValueError):
                self._gone = True
            with self._changed:
                self._chars -= len(text)
                self._changed.notify_all()
                if self._gone:
                    return


def _write(stream: TextIO, data: bytes) -> None:
    """Past the stream's own buffer, whose lock a stuck thread would hold into the interpreter's end."""
    while data:
        data = data[os.write(stream.fileno(), data) :]
