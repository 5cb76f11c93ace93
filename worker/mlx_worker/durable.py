"""Files that have reached the device when the call returns."""

import contextlib
import errno
import fcntl
import hashlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

FILE_MODE = 0o600
_CHUNK_BYTES = 16 * 1024 * 1024  # macOS refuses writes of 2 GiB and more
_UNSUPPORTED = {errno.EINVAL, errno.ENOTSUP, errno.ENOTTY}


def flush_to_device(descriptor: int) -> None:
    """Return once the file's content is on the device. Raises OSError; then the content is lost for good.

    macOS: fsync alone leaves the data in the drive's own cache; F_FULLFSYNC does not, but some file systems lack it.
    A failed fsync must not be repeated on the same file: the system has marked the unwritten pages as clean.
    """
    if sys.platform == "darwin":
        try:
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
            return
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
    os.fsync(descriptor)


def flush_folder(folder: Path) -> None:
    """Return once the folder's entries (names made, renamed, removed) are on the device. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        flush_to_device(descriptor)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:  # some file systems flush names by themselves and refuse the call
            raise
    finally:
        os.close(descriptor)


class HashingFile:
    """A new file of mode 0600 that hashes what is written to it; what `mx.save_safetensors` takes for a file."""

    closed = False

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE_MODE)
        self._hash = hashlib.sha256()
        self.size_bytes = 0

    def write(self, data: Any) -> int:
        """All of it (MLX does not look at the number that came back). Raises OSError."""
        view = memoryview(data).cast("B")
        done = 0
        while done < len(view):
            chunk = view[done : done + _CHUNK_BYTES]
            written = os.write(self._descriptor, chunk)
            if written == 0:
                raise OSError(errno.EIO, "the device took no byte")
            self._hash.update(chunk[:written])
            done += written
        self.size_bytes += done
        return done

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Only asked for by MLX's check that this is a file."""
        return os.lseek(self._descriptor, offset, whence)

    def tell(self) -> int:
        """Bytes written so far."""
        return self.size_bytes

    def flush(self) -> None:
        """Flush to the device. Raises OSError."""
        flush_to_device(self._descriptor)

    def close(self) -> None:
        """Close; what was not flushed may be lost."""
        if not self.closed:
            self.closed = True
            os.close(self._descriptor)

    def hexdigest(self) -> str:
        """SHA-256 of everything written."""
        return self._hash.hexdigest()


def write_file(path: Path, write: Callable[[HashingFile], object]) -> tuple[int, str]:
    """Make a new file with `write`, flush it, and give its size in bytes and its SHA-256. Raises OSError."""
    file = HashingFile(path)
    try:
        write(file)
        file.flush()
    except BaseException:
        with contextlib.suppress(OSError):  # the first error is the one to tell
            file.close()
        raise
    file.close()
    return file.size_bytes, file.hexdigest()


def read_hash(path: Path) -> tuple[int, str]:
    """Size in bytes and SHA-256 of a regular file as it is on disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb", buffering=0) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return os.fstat(descriptor).st_size, digest
