"""Files that have reached the device when the call returns, and every call by which a checkpoint changes the disk."""

import contextlib
import errno
import fcntl
import hashlib
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

FILE_MODE, FOLDER_MODE = 0o600, 0o700
_CHUNK_BYTES = 16 * 1024 * 1024  # macOS refuses writes of 2 GiB and more
_UNSUPPORTED = {errno.EINVAL, errno.ENOTSUP, errno.ENOTTY}
_NOT_OURS = {errno.EACCES, errno.EPERM, errno.EROFS}  # a folder that we may not open is none that we made


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


class Files:
    """Every call that changes the disk, one step each. A test puts in one that fails, or that forgets in a crash.

    All raise OSError.
    """

    def make_folder(self, path: Path) -> None:
        """A new folder that only its owner may enter."""
        path.mkdir(mode=FOLDER_MODE)

    def create(self, path: Path) -> int:
        """The descriptor of a new, empty file that only its owner may read."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE_MODE)

    def write(self, descriptor: int, data: memoryview) -> int:
        """Append; the number of bytes that were taken, which may be fewer than came."""
        return os.write(descriptor, data)

    def flush_file(self, descriptor: int) -> None:
        """Return once the content is on the device; the file's name is not part of that."""
        flush_to_device(descriptor)

    def close(self, descriptor: int) -> None:
        """Close; what was not flushed may be lost."""
        os.close(descriptor)

    def flush_folder(self, folder: Path) -> None:
        """Return once the folder's entries (names made, renamed, removed) are on the device."""
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            flush_to_device(descriptor)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:  # some file systems flush names by themselves and refuse the call
                raise
        finally:
            os.close(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        """Give a folder another name in the same folder; it has one of the two at any moment."""
        source.replace(target)

    def delete_file(self, path: Path) -> None:
        """Remove a name that is no folder's; what a link points to stays."""
        path.unlink()

    def delete_folder(self, path: Path) -> None:
        """Remove an empty folder."""
        path.rmdir()


def make_folders(files: Files, folder: Path) -> None:
    """Make the folder and the ancestors it lacks, and flush the names of all. Raises OSError.

    Names are flushed even of what was there: whoever made it may have died before that.
    """
    for place in reversed([folder, *folder.parents]):
        if not place.is_dir():
            files.make_folder(place)
    device = folder.stat().st_dev
    for place in [folder, *folder.parents]:
        if place.stat().st_dev != device:
            break  # a mount point is older than what is mounted there
        try:
            files.flush_folder(place)
        except OSError as error:
            if error.errno not in _NOT_OURS:
                raise


def delete_tree(files: Files, folder: Path) -> None:
    """Delete the folder with all that is in it, as far as that works: what stays is deleted by the next attempt."""
    for place, folders, names in os.walk(folder, topdown=False):  # it does not follow links
        links = [name for name in folders if Path(place, name).is_symlink()]
        for name in [*names, *links]:
            with contextlib.suppress(OSError):
                files.delete_file(Path(place, name))
        with contextlib.suppress(OSError):
            files.delete_folder(Path(place))


class HashingFile:
    """A new file of mode 0600 that hashes what is written to it; what `mx.save_safetensors` takes for a file."""

    closed = False

    def __init__(self, path: Path, files: Files) -> None:
        self._files = files
        self._descriptor = files.create(path)
        self._hash = hashlib.sha256()
        self.size_bytes = 0

    def write(self, data: Any) -> int:
        """All of it (MLX does not look at the number that came back). Raises OSError."""
        view = memoryview(data).cast("B")
        done = 0
        while done < len(view):
            chunk = view[done : done + _CHUNK_BYTES]
            written = self._files.write(self._descriptor, chunk)
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
        self._files.flush_file(self._descriptor)

    def close(self) -> None:
        """Close; what was not flushed may be lost."""
        if not self.closed:
            self.closed = True
            self._files.close(self._descriptor)

    def hexdigest(self) -> str:
        """SHA-256 of everything written."""
        return self._hash.hexdigest()


def write_file(path: Path, write: Callable[[HashingFile], object], files: Files) -> tuple[int, str]:
    """Make a new file with `write`, flush it, and give its size in bytes and its SHA-256. Raises OSError."""
    file = HashingFile(path, files)
    try:
        write(file)
        file.flush()
    except BaseException:
        with contextlib.suppress(OSError):  # the first error is the one to tell
            file.close()
        raise
    file.close()
    return file.size_bytes, file.hexdigest()


def open_to_read(path: Path) -> io.FileIO:
    """A file as it is on disk; links are not followed, and a pipe of that name is not waited for. Raises OSError."""
    return io.FileIO(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb")


def read_hash(path: Path) -> tuple[int, str]:
    """Size in bytes and SHA-256 of a regular file as it is on disk. Raises OSError."""
    with open_to_read(path) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return os.fstat(file.fileno()).st_size, digest
