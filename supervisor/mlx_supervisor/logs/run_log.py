"""The two log files of one run: worker and supervisor append, and rotation keeps their descriptors valid."""

import contextlib
import os
import re
from pathlib import Path

from mlx_supervisor.logs.daemon_log import LOG_BACKUPS, LOG_BYTES, MODE

LINE_LIMIT = 8192
TAIL_LIMIT_BYTES = 16 * 1024
_COPY_BYTES = 1024 * 1024
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f]")


class RunLog:
    """`stdout.log` and `stderr.log` of one run. A worker inherits the descriptors; both sides append.

    Rotation copies and truncates, so a worker's descriptor stays valid: every writer must append (O_APPEND). What a
    worker writes between the copy and the truncation is lost. Of a file that grew past twice `max_bytes` between two
    checks, only the last `max_bytes` are kept. Only the constructor and `clear` raise OSError.
    """

    def __init__(self, folder: Path, max_bytes: int = LOG_BYTES, backups: int = LOG_BACKUPS) -> None:
        self.folder = folder
        self.stdout_path = folder / "stdout.log"
        self.stderr_path = folder / "stderr.log"
        self._max_bytes = max_bytes
        self._backups = backups
        self._stderr_truncated_bytes = 0
        self._stderr_deleted = self._torn = False
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._stdout = _open(self.stdout_path)
        try:
            self._stderr = _open(self.stderr_path)
        except OSError:
            os.close(self._stdout)
            raise

    def descriptors(self) -> tuple[int, int]:
        """For a worker's stdout and stderr. Don't close them."""
        if self._stderr_deleted:
            with contextlib.suppress(OSError):
                new, old = _open(self.stderr_path), self._stderr
                self._stderr_truncated_bytes += os.fstat(old).st_size
                self._stderr, self._stderr_deleted = new, False
                os.close(old)
        return self._stdout, self._stderr

    def line(self, text: str) -> None:
        """Append one line to stdout.log; control characters other than tab become spaces."""
        data = _CONTROL.sub(" ", text)[:LINE_LIMIT].encode("utf-8", "replace") + b"\n"
        with contextlib.suppress(OSError):
            if self._torn:  # the disk took only a part of an earlier line
                data = b"\n" + data
            written = os.write(self._stdout, data)
            self._torn = written < len(data) and (written > 0 or self._torn)

    def stderr_offset(self) -> int:
        """The end of stderr, in bytes ever written: read it before a generation, pass it to `tail_since` after."""
        try:
            return self._stderr_truncated_bytes + os.fstat(self._stderr).st_size
        except OSError:
            return self._stderr_truncated_bytes

    def tail_since(self, offset: int, limit_bytes: int = TAIL_LIMIT_BYTES) -> str:
        """The last `limit_bytes` of stderr, from `offset` on, including what was rotated.

        A file that was truncated by another program is read from its start.
        """
        try:
            size = os.fstat(self._stderr).st_size
            start = offset - self._stderr_truncated_bytes
            data = os.pread(self._stderr, limit_bytes, max(start if start <= size else 0, size - limit_bytes, 0))
            if start < 0 and len(data) < limit_bytes:
                data = self._end_of_copy(min(-start, limit_bytes - len(data))) + data
        except OSError as error:
            return f"(stderr.log can't be read: {error})"
        return data.decode("utf-8", "replace")

    def _end_of_copy(self, size_bytes: int) -> bytes:
        try:
            with _backup(self.stderr_path, 1).open("rb") as file:
                file.seek(max(os.fstat(file.fileno()).st_size - size_bytes, 0))
                return file.read(size_bytes)
        except OSError:  # no copies are kept, or the disk had no room for it
            return b""

    def rotate_if_needed(self) -> bool:
        """Rotate the files over their limit. Returns whether one was rotated; a failure is retried next time."""
        rotated = False
        for descriptor, path in ((self._stdout, self.stdout_path), (self._stderr, self.stderr_path)):
            with contextlib.suppress(OSError):
                if os.fstat(descriptor).st_size > self._max_bytes:
                    self._rotate(descriptor, path)
                    rotated = True
        return rotated

    def restore_if_deleted(self) -> bool:
        """Make deleted files again. Returns whether one was made; a failure is retried next time.

        The running worker still writes to the deleted files, the next one to the new. Until then `tail_since` reads the
        deleted stderr, for the cause of the worker's death.
        """
        missing = [path for path in (self.stdout_path, self.stderr_path) if not path.exists()]
        if not missing or self._stdout < 0:
            return False
        with contextlib.suppress(OSError):
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if self.stdout_path in missing:
                new, old = _open(self.stdout_path), self._stdout
                self._stdout = new
                os.close(old)
            if self.stderr_path in missing:
                os.close(_open(self.stderr_path))
                self._stderr_deleted = True
            return True
        return False

    def _rotate(self, descriptor: int, path: Path) -> None:
        try:
            for number in range(self._backups - 1, 0, -1):
                with contextlib.suppress(FileNotFoundError):
                    _backup(path, number).rename(_backup(path, number + 1))
            if self._backups:
                self._copy_end(descriptor, _backup(path, 1))
        finally:
            # also when the disk is too full for the copy
            self._empty(descriptor)

    def _empty(self, descriptor: int) -> None:
        if descriptor == self._stderr:
            self._stderr_truncated_bytes += os.fstat(descriptor).st_size
        os.ftruncate(descriptor, 0)

    def _copy_end(self, descriptor: int, target: Path) -> None:
        size = os.fstat(descriptor).st_size
        position = 0 if size <= 2 * self._max_bytes else size - self._max_bytes
        out = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, MODE)
        try:
            while position < size and (data := os.pread(descriptor, min(_COPY_BYTES, size - position), position)):
                position += os.write(out, data)
        finally:
            os.close(out)

    def clear(self) -> None:
        """Empty both files and remove their older copies. Raises OSError."""
        for descriptor, path in ((self._stdout, self.stdout_path), (self._stderr, self.stderr_path)):
            self._empty(descriptor)
            for number in range(1, self._backups + 1):
                _backup(path, number).unlink(missing_ok=True)

    def close(self) -> None:
        """Close both files. May be called again."""
        descriptors, self._stdout, self._stderr = (self._stdout, self._stderr), -1, -1
        for descriptor in descriptors:
            if descriptor >= 0:
                os.close(descriptor)


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, MODE)


def _backup(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}.{number}")
