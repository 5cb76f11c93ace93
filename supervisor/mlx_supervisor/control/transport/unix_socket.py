"""The socket's file: checks its path and its folder's owner, and replaces the file of a daemon that died."""

import errno
import os
import socket
import stat
from pathlib import Path

PATH_LIMIT_BYTES = 100
"""The system's own limit is 103 bytes on macOS and 107 on Linux."""
BACKLOG = 64
PROBE_TIMEOUT_S = 2.0


class SocketFileError(Exception):
    """The control socket cannot be created; the text says why and what to do."""


class SocketFile:
    """A listening Unix socket that only its owner can reach. `close` removes the file unless it was replaced.

    The lock on the state folder keeps two daemons from starting at the same moment.
    """

    def __init__(self, path: Path) -> None:
        """Raises SocketFileError."""
        _check_path(path)
        self.path = path
        try:
            _prepare_folder(path.parent)
            _remove_stale(path)
            self.socket = _listen(path)
            self._identity = _identity(path)
        except OSError as error:
            raise SocketFileError(f"{path}: cannot listen on this socket: {error.strerror or error}") from error

    def close(self) -> None:
        """Remove the file; the socket itself belongs to the server that listens on it."""
        try:
            if _identity(self.path) == self._identity:
                self.path.unlink()
        except OSError:
            pass  # already removed, or the disk failed; the next daemon replaces a stale file


def _check_path(path: Path) -> None:
    length = len(os.fsencode(path))
    if length >= PATH_LIMIT_BYTES:
        raise SocketFileError(
            f"{path}: {length} bytes are too long for the path of a socket (under {PATH_LIMIT_BYTES} are allowed); "
            "choose a shorter state_dir"
        )


def _prepare_folder(folder: Path) -> None:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.geteuid():
        raise SocketFileError(
            f"{folder}: belongs to user {status.st_uid}; the control socket needs a folder of your own (state_dir)"
        )
    if stat.S_IMODE(status.st_mode) & 0o077:
        folder.chmod(0o700)


def _remove_stale(path: Path) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise SocketFileError(f"{path}: exists and is not a socket; move it away, or choose another state_dir")
    if _answers(path):
        raise SocketFileError(f"{path}: another daemon answers on this socket; stop it, or choose another state_dir")
    path.unlink()


def _answers(path: Path) -> bool:
    """Whether a daemon listens; also after a timeout or with a full queue."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(PROBE_TIMEOUT_S)
        return probe.connect_ex(os.fspath(path)) not in (errno.ECONNREFUSED, errno.ENOENT)


def _listen(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        before = os.umask(0o177)  # the file must never exist with a wider mode, not even briefly
        try:
            listener.bind(os.fspath(path))
        finally:
            os.umask(before)
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    return listener


def _identity(path: Path) -> tuple[int, int]:
    status = path.lstat()
    return status.st_dev, status.st_ino
