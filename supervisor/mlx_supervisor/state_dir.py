"""The folder that holds all that outlives a process: made private, claimed by one supervisor at a time."""

import fcntl
import os
from pathlib import Path

SOCKET_PATH_LIMIT_BYTES = 100
"""The shortest limit among the systems (macOS: 104 with the final zero), with some room."""


class StateDirError(Exception):
    """The folder can't be used; the text says why and what to do."""


class StateDir:
    """`path`, locked for this process until `close`. Raises StateDirError."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.control_socket = path / "supervisor.sock"
        self.telemetry_socket = path / "telemetry.sock"
        self.journal = path / "journal.db"
        self.log = path / "supervisor.log"
        self._prepare()
        self._lock = self._claim()

    def run_dir(self, run: str) -> Path:
        """The run's folder, made if need be. Raises StateDirError."""
        folder = self.path / "runs" / run
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise StateDirError(f"{folder}: {error.strerror}") from error
        return folder

    def close(self) -> None:
        """Let another supervisor have it."""
        os.close(self._lock)

    def _prepare(self) -> None:
        longest = len(os.fsencode(self.telemetry_socket))
        if longest > SOCKET_PATH_LIMIT_BYTES:
            raise StateDirError(
                f"state_dir {self.path}: its sockets' paths would have {longest} bytes, at most "
                f"{SOCKET_PATH_LIMIT_BYTES} are allowed; choose a shorter state_dir"
            )
        try:
            self._refuse_foreign()
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            owner = self.path.stat().st_uid
            if owner != os.getuid():
                raise StateDirError(f"state_dir {self.path} belongs to user {owner}, we are user {os.getuid()}")
            self.path.chmod(0o700)
        except OSError as error:
            raise StateDirError(
                f"state_dir {self.path} can't be used: {error.strerror}; allowed: a folder that this user may write"
            ) from error

    def _refuse_foreign(self) -> None:
        """A folder with other things in it is not ours to make private."""
        if not self.path.is_dir() or (self.path / "supervisor.lock").exists():
            return
        other = next((entry.name for entry in self.path.iterdir()), None)
        if other is not None:
            raise StateDirError(
                f"state_dir {self.path} holds other things ({other}); allowed: a folder of its own, new or empty"
            )

    def _claim(self) -> int:
        path = self.path / "supervisor.lock"
        try:
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StateDirError(f"{path} can't be written: {error.strerror}") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(lock, 0)
            os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
        except BlockingIOError:
            owner = os.pread(lock, 32, 0).decode("ascii", "replace").strip() or "unknown"
            os.close(lock)
            raise StateDirError(
                f"state_dir {self.path} is owned by a running supervisor (process {owner}); "
                f"use `supervisorctl` to talk to it, or choose another --state-dir"
            ) from None
        except OSError as error:
            os.close(lock)
            raise StateDirError(f"{path} can't be written: {error.strerror}") from error
        return lock
