"""Files that are on the device when the call returns, and every call by which a checkpoint changes the disk."""

import contextlib
import errno
import fcntl
import hashlib
import io
import os
import secrets
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

FILE_MODE, FOLDER_MODE = 0o600, 0o700
_CHUNK_BYTES = 16 * 1024 * 1024  # macOS refuses writes of 2 GiB and more
_UNSUPPORTED = {errno.EINVAL, errno.ENOTSUP, errno.ENOTTY}
_FOREIGN = {errno.EACCES, errno.EPERM, errno.EROFS}  # a folder that cannot be opened was made by another program


def flush_to_device(descriptor: int) -> None:
    """Return once the file's content is on the device. Raises OSError; then the content is lost.

    macOS: fsync alone leaves the data in the drive's own cache; F_FULLFSYNC does not, but some file systems lack it.
    Never repeat a failed fsync on the same file: the system has marked the unwritten pages as clean.
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
    """Every call that changes the disk, one step each; tests replace it to inject faults and crashes.

    All raise OSError.
    """

    def make_folder(self, path: Path) -> None:
        """Make a folder that only its owner may enter."""
        path.mkdir(mode=FOLDER_MODE)

    def create(self, path: Path) -> int:
        """Make an empty file that only its owner may read; returns its descriptor."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE_MODE)

    def write(self, descriptor: int, data: memoryview) -> int:
        """Append; returns the number of bytes written, which may be fewer than given."""
        return os.write(descriptor, data)

    def flush_file(self, descriptor: int) -> None:
        """Return once the content is on the device; the file's name may not be."""
        flush_to_device(descriptor)

    def close(self, descriptor: int) -> None:
        """Close; unflushed content may be lost."""
        os.close(descriptor)

    def flush_folder(self, folder: Path) -> None:
        """Return once the folder's entries (names made, renamed, removed) are on the device."""
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            flush_to_device(descriptor)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:  # some file systems refuse the call because they always flush names
                raise
        finally:
            os.close(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        """Rename a file or a folder within its parent, atomically."""
        source.replace(target)

    def delete_file(self, path: Path) -> None:
        """Remove a file or a link; a link's target stays."""
        path.unlink()

    def delete_folder(self, path: Path) -> None:
        """Remove an empty folder."""
        path.rmdir()


def make_folders(files: Files, folder: Path) -> None:
    """Make the folder and its missing ancestors, and flush all their names. Raises OSError.

    Existing folders are flushed too: the process that made them may have died before it flushed.
    """
    for place in reversed([folder, *folder.parents]):
        if not place.is_dir():
            files.make_folder(place)
    device = folder.stat().st_dev
    for place in [folder, *folder.parents]:
        if place.stat().st_dev != device:
            break  # the parents of a mount point are older
        try:
            files.flush_folder(place)
        except OSError as error:
            if error.errno not in _FOREIGN:
                raise


def delete_tree(files: Files, folder: Path) -> None:
    """Delete the folder with its contents as far as possible; the next attempt deletes the rest."""
    for place, folders, names in os.walk(folder, topdown=False):  # does not follow links
        links = [name for name in folders if Path(place, name).is_symlink()]
        for name in [*names, *links]:
            with contextlib.suppress(OSError):
                files.delete_file(Path(place, name))
        with contextlib.suppress(OSError):
            files.delete_folder(Path(place))


class HashingFile:
    """A new file of mode 0600 that hashes its content; `mx.save_safetensors` accepts it as a file."""

    closed = False

    def __init__(self, path: Path, files: Files) -> None:
        self._files = files
        self._descriptor = files.create(path)
        self._hash = hashlib.sha256()
        self.size_bytes = 0

    def write(self, data: Any) -> int:
        """Write all of it (MLX ignores the returned number). Raises OSError."""
        view = memoryview(data).cast("B")
        done = 0
        while done < len(view):
            chunk = view[done : done + _CHUNK_BYTES]
            written = self._files.write(self._descriptor, chunk)
            if written == 0:
                raise OSError(errno.EIO, "the device accepted no bytes")
            self._hash.update(chunk[:written])
            done += written
        self.size_bytes += done
        return done

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Needed only by MLX's check that this is a file."""
        return os.lseek(self._descriptor, offset, whence)

    def tell(self) -> int:
        """Bytes written so far."""
        return self.size_bytes

    def flush(self) -> None:
        """Flush to the device. Raises OSError."""
        self._files.flush_file(self._descriptor)

    def close(self) -> None:
        """Close; unflushed content may be lost."""
        if not self.closed:
            self.closed = True
            self._files.close(self._descriptor)

    def hexdigest(self) -> str:
        """SHA-256 of everything written."""
        return self._hash.hexdigest()


def write_file(path: Path, write: Callable[[HashingFile], object], files: Files) -> tuple[int, str]:
    """Make a new file with `write` and flush it; returns its size in bytes and its SHA-256. Raises OSError."""
    file = HashingFile(path, files)
    try:
        write(file)
        file.flush()
    except BaseException:
        with contextlib.suppress(OSError):  # report the first error
            file.close()
        raise
    file.close()
    return file.size_bytes, file.hexdigest()


class SharedFiles(Files):
    """Files that others may read, as far as the user's umask allows: results, not checkpoints."""

    def create(self, path: Path) -> int:
        """Make an empty file; returns its descriptor."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)


def try_folder(folder: Path) -> None:
    """Make the folder, write a small file into it, and delete that. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f".mlx-supervisor-{secrets.token_hex(4)}.tmp"
    try:
        write_file(probe, lambda file: file.write(b"test\n"), Files())
    finally:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            probe.unlink()


def replace_file(path: Path, write: Callable[[HashingFile], object]) -> None:
    """Make or replace a result with `write`, atomically and flushed. Raises OSError; then the old file stays.

    A failed attempt leaves nothing behind: on a full disk its bytes are needed.
    """
    files, temporary = SharedFiles(), path.with_name(f".{path.name}.tmp")
    with contextlib.suppress(FileNotFoundError):
        files.delete_file(temporary)
    try:
        write_file(temporary, write, files)
        files.rename(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            files.delete_file(temporary)
        raise
    files.flush_folder(path.parent)


def open_to_read(path: Path) -> io.FileIO:
    """Open a file without following links or waiting for a pipe. Raises OSError."""
    return io.FileIO(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb")


def read_hash(path: Path) -> tuple[int, str]:
    """Size in bytes and SHA-256 of a regular file on disk. Raises OSError."""
    with open_to_read(path) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return os.fstat(file.fileno()).st_size, digest
