"""The lock of a run's folder: its worker holds it for life, and records there who it is and how far it has trained.

`flock` belongs to the open file, so that a worker inherits the lock that its supervisor took for it, and the kernel
releases it when the last process that has it open ends. The folder itself is locked too: the file may be deleted.
"""

import contextlib
import errno
import fcntl
import os
from pathlib import Path

import msgspec

LOCK_FILE = "worker.lock"
RECORD_BYTES = 1024
"""Room for the record at the start of the file; the progress follows."""
UNSUPPORTED = frozenset({errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL, errno.EBADF})
"""What file systems without flock answer."""
_REOPENED_AT_MOST = 10


class Holder(msgspec.Struct, frozen=True, kw_only=True):
    """Who took the lock last. `pid` 0: not started yet; then its token identifies it. `started_s`: process start time.

    `boot`: which start of the machine it belongs to; "" if unknown.
    """

    generation: int
    pid: int = 0
    started_s: float = 0.0
    token: str = ""
    host: str = ""
    boot: str = ""


class Progress(msgspec.Struct, frozen=True):
    """How far a generation has trained: from the update after `resumed` to `last`."""

    generation: int
    resumed: int
    last: int


class HeldError(Exception):
    """Another process holds the lock."""


class RunLock:
    """The lock of this folder, taken. `supported` False: the file system has no locks, so only the record protects."""

    def __init__(self, file: int, folder: int | None, *, supported: bool = True) -> None:
        self._file, self._folder = file, folder
        self.supported = supported

    @classmethod
    def take(cls, folder: Path) -> "RunLock":
        """Take it without waiting. Raises HeldError, and OSError when the file can't be opened."""
        directory = _locked_folder(folder)
        try:
            file, supported = _locked_file(folder / LOCK_FILE)
        except BaseException:
            _close(directory)
            raise
        return cls(file, directory, supported=supported)

    @classmethod
    def inherited(cls, descriptors: str) -> "RunLock":
        """The lock that the parent took, from what `descriptors` returned there. Raises ValueError and OSError."""
        numbers = [int(number) for number in descriptors.split(",")]
        for number in numbers:
            os.set_inheritable(number, False)  # what the worker starts must not hold it
        return cls(numbers[0], numbers[1] if len(numbers) > 1 else None)

    @property
    def descriptors(self) -> list[int]:
        """The open files that hold it."""
        return [self._file, *([] if self._folder is None else [self._folder])]

    def record(self, holder: Holder) -> None:
        """Write who holds it; a full disk is ignored, since the lock counts and not its record."""
        with contextlib.suppress(OSError):
            os.pwrite(self._file, msgspec.json.encode(holder).ljust(RECORD_BYTES - 1) + b"\n", 0)

    def progress(self, progress: Progress) -> None:
        """Write how far the worker has trained: at once visible to others, also after SIGKILL; not flushed."""
        with contextlib.suppress(OSError):
            line = f"{progress.generation:020d} {progress.resumed:020d} {progress.last:020d}\n"
            os.pwrite(self._file, line.encode(), RECORD_BYTES)

    def close(self) -> None:
        """Close this process's descriptors; another process that inherited them holds the lock on."""
        _close(self._file)
        _close(self._folder)


def is_held(folder: Path) -> bool | None:
    """Whether some process holds the lock of this folder; None where the file system has no locks. Raises OSError."""
    results = []
    for path in (folder / LOCK_FILE, folder):
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:
            continue
        try:
            results.append(_try(descriptor, fcntl.LOCK_SH))  # two that only test do not meet
        finally:
            os.close(descriptor)
    if False in results:
        return True
    return False if True in results or not results else None


def read_holder(folder: Path) -> Holder | None:
    """Who took the lock last; None when that is not recorded, or unreadable."""
    try:
        return msgspec.json.decode(_read(folder)[:RECORD_BYTES], type=Holder)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        return None


def read_progress(folder: Path) -> Progress | None:
    """How far the last holder has trained; None when it made no update, or the record is unreadable."""
    try:
        numbers = [int(word) for word in _read(folder)[RECORD_BYTES:].split()]
    except (OSError, ValueError):
        return None
    return Progress(*numbers) if len(numbers) == 3 and numbers[2] > numbers[1] >= 0 else None


def _read(folder: Path) -> bytes:
    with (folder / LOCK_FILE).open("rb") as file:
        return file.read(2 * RECORD_BYTES)


def _locked_file(path: Path) -> tuple[int, bool]:
    for _ in range(_REOPENED_AT_MOST):
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)
        try:
            locked = _try(file, fcntl.LOCK_EX)
            if locked is False:
                raise HeldError
            if os.path.samestat(os.fstat(file), path.stat()):
                return file, locked is not None
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(file)
            raise
        os.close(file)  # deleted or replaced after it was opened
    raise OSError(errno.ESTALE, f"{path}: replaced again and again")


def _locked_folder(folder: Path) -> int | None:
    directory = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        locked = _try(directory, fcntl.LOCK_EX)
        if locked is False:
            raise HeldError
    except BaseException:
        os.close(directory)
        raise
    if locked is None:  # NFS locks only files that are open for writing
        os.close(directory)
        return None
    return directory


def _try(descriptor: int, kind: int) -> bool | None:
    """Whether the lock could be taken; None where there are no locks."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in UNSUPPORTED:
            return None
        raise
    return True


def _close(descriptor: int | None) -> None:
    if descriptor is not None:
        with contextlib.suppress(OSError):
            os.close(descriptor)
