"""The state folder: private to its owner, locked by one supervisor at a time."""

import fcntl
import json
import os
import shutil
from collections.abc import Collection
from pathlib import Path

SOCKET_PATH_LIMIT_BYTES = 100
"""Just below the lowest limit of the supported systems (macOS: 104 with the final zero)."""
TELEMETRY_SOCKET = "telemetry.sock"
PROJECTS = "projects"
"""Folder in the user's state folder with the state folders of settings files that name none."""
MARKS = ("supervisor.lock", "journal.db", "supervisor.log", "supervisor.sock", TELEMETRY_SOCKET)
"""Any of these makes a folder a state folder."""


COMMAND_LINE = "command-line"
"""The run's settings path without any file is this name in the current folder: it identifies the run."""
OWNER = "owner.json"
"""In a run's folder: the settings file that the run belongs to, also when the journal is lost."""
PREVIOUS_AT_MOST = 9
REPLACEABLE = frozenset(
    {OWNER, "worker.lock", "logs", "job.json", "accepted-job.json", "summary.json", "fingerprints.json", "reports.json"}
    | {"last-message.json", ".last-message.json.tmp"}
)
"""What a run's folder has before the first checkpoint: never worth the loss of a run that was set aside."""


class StateDirError(Exception):
    """The folder can't be used; the text says why and what to do."""


class StateDir:
    """`path`, locked for this process until `close`. Raises StateDirError."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.control_socket = path / "supervisor.sock"
        self.telemetry_socket = path / TELEMETRY_SOCKET
        self.journal = path / "journal.db"
        self.log = path / "supervisor.log"
        self._prepare()
        self._locks = self._claim()

    def run_dir(self, run: str) -> Path:
        """The run's folder, created if needed. Raises StateDirError."""
        folder = self.path / "runs" / run
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise StateDirError(f"{folder}: {error.strerror}") from error
        return folder

    def close(self) -> None:
        """Unlock the folder."""
        for lock in self._locks:
            os.close(lock)

    def _prepare(self) -> None:
        try:
            require_usable(self.path)
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            require_owned(self.path)
            self.path.chmod(0o700)
        except OSError as error:
            raise StateDirError(unusable(self.path, error.strerror)) from error

    def _claim(self) -> list[int]:
        """Lock the file, and the folder too: a cleaner of temporary folders may delete the file."""
        path = self.path / "supervisor.lock"
        try:
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StateDirError(f"{path} can't be written: {error.strerror}") from error
        folder = -1
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            folder = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            _lock_folder(folder)
            os.ftruncate(lock, 0)
            os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
        except BlockingIOError:
            owner = os.pread(lock, 32, 0).decode("ascii", "replace").strip() or "unknown"
            _close(lock, folder)
            raise StateDirError(
                f"state_dir {self.path} is in use by a running supervisor (process {owner}): `mlx-supervisor status` "
                "shows its runs, `supervisorctl -c FILE status` (or stop, restart) controls them; "
                "to train beside it, add --state-dir FOLDER"
            ) from None
        except OSError as error:
            _close(lock, folder)
            raise StateDirError(f"{path} can't be written: {error.strerror}") from error
        return [lock, folder]


def _lock_folder(folder: int) -> None:
    """Raises BlockingIOError while another supervisor holds it."""
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:  # NFS locks only files that are open for writing
        return


def _close(*descriptors: int) -> None:
    for descriptor in descriptors:
        if descriptor >= 0:
            os.close(descriptor)


def unusable(path: Path, reason: str | None) -> str:
    """The problem of a state folder that can't be used, as a person reads it."""
    return f"state_dir {path} can't be used: {reason}; allowed: a folder that this user may write"


def require_usable(path: Path) -> None:
    """Read-only. Raises StateDirError for a path that is too long, and OSError.

    Also for a folder with other contents: the mode of such a folder must not be changed.
    """
    longest = len(os.fsencode(path / TELEMETRY_SOCKET))
    if longest > SOCKET_PATH_LIMIT_BYTES:
        raise StateDirError(
            f"state_dir {path}: too long for its sockets: found a path of {longest} bytes, at most "
            f"{SOCKET_PATH_LIMIT_BYTES} are allowed; choose a shorter state_dir"
        )
    if not path.is_dir() or any(os.path.lexists(path / name) for name in MARKS):
        return
    own = {PROJECTS, *(["runs"] if any(path.glob(f"runs/*/{OWNER}")) else [])}
    other = next((entry.name for entry in path.iterdir() if entry.name not in own), None)
    if other is not None:
        raise StateDirError(f"state_dir {path} has other contents (found {other}); allowed: a new or empty folder")


def require_owned(path: Path) -> None:
    """Raises StateDirError for another user's folder, and OSError."""
    owner = path.stat().st_uid
    if owner != os.getuid():
        raise StateDirError(f"state_dir {path} belongs to user {owner}; the supervisor runs as user {os.getuid()}")


def owner_of(folder: Path) -> str:
    """The settings file that the run in this folder belongs to; "" if that is unknown."""
    try:
        content = json.loads((folder / OWNER).read_bytes())
    except (OSError, ValueError, RecursionError):
        return ""
    file = content.get("settings_file") if isinstance(content, dict) else None
    return file if isinstance(file, str) else ""


def is_present(file: Path) -> bool:
    """Whether a settings file exists, or the folder in which a run without one was started."""
    return (file.parent if file.name == COMMAND_LINE else file).exists()


def left_behind(state: Path, run: str, file: Path) -> tuple[str, Path] | None:
    """A run of this name whose settings file was probably moved to `file`: its old path and its state folder.

    Only among the state folders of `PROJECTS`: the old file no longer exists, and was in the same folder (it was
    renamed), or had the same name and the same folder name (the project was moved) or grandparent (that was renamed).
    """
    if state.parent.name != PROJECTS:
        return None
    for owner in sorted(state.parent.glob(f"*/runs/{run}/{OWNER}")):
        old = Path(owner_of(owner.parent))
        project = old.parent.name == file.parent.name or old.parents[1:2] == file.parents[1:2]
        renamed = old.parent == file.parent and old.suffix == file.suffix
        if (renamed or (old.name == file.name and project)) and old != file and not is_present(old):
            return str(old), owner.parents[2]
    return None


def record_owner(folder: Path, run: str, file: str) -> None:
    """Note the settings file that the run in this folder belongs to. Raises StateDirError."""
    if owner_of(folder) == file:
        return
    temporary = folder / f".{OWNER}.tmp"
    try:
        temporary.write_text(json.dumps({"run": run, "settings_file": file}) + "\n")
        temporary.replace(folder / OWNER)
    except OSError as error:
        raise StateDirError(f"{folder / OWNER} can't be written: {error.strerror}") from error


def set_aside(folder: Path, taken: Collection[str]) -> Path | None:
    """Rename a run's folder to `NAME.previous`, replacing an older one of the same owner.

    None if it holds no checkpoint and nothing else to keep: its owner is then forgotten, and the next run uses it.

    A folder of another or of an unknown owner is kept: the next free of `NAME.previous.2` to `.9` is used. `taken`:
    names of runs. Raises StateDirError when all are in use, and OSError.
    """
    if not folder.is_dir():
        return None
    if not any(_is_kept(entry) for entry in folder.iterdir()):
        (folder / OWNER).unlink(missing_ok=True)
        return None
    owner = owner_of(folder)
    numbers = ["", *(f".{number}" for number in range(2, PREVIOUS_AT_MOST + 1))]
    names = [f"{folder.name}.previous{number}" for number in numbers]
    for path in (folder.with_name(name) for name in names if name not in taken):
        if path.exists() and (owner == "" or owner_of(path) != owner):
            continue
        if path.exists():
            shutil.rmtree(path)
        folder.rename(path)
        return path
    held = f"{folder.with_name(names[0])} to {names[-1]} hold runs of other settings files"
    raise StateDirError(f"--fresh: {held}; delete those that are not needed")


def _is_kept(entry: Path) -> bool:
    if entry.name == "checkpoints" and entry.is_dir():
        return any(entry.glob("step-*"))
    return entry.name not in REPLACEABLE
