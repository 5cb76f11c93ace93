"""The folder of a run's results belongs to that run: no other run may overwrite finished results in silence."""

import contextlib
import fcntl
import itertools
import json
import os
import shlex
from collections.abc import Iterator
from pathlib import Path

import msgspec

from mlx_supervisor import wire
from mlx_worker.errors import RefusedError

OWNER_FILE = ".mlx-supervisor-owner.json"
"""In the folder: the run that writes it. Deleting it gives the folder free."""
_LIMIT_BYTES = 64 * 1024


class Owner(msgspec.Struct, frozen=True):
    """What identifies a run."""

    run: str
    settings_file: str

    def __str__(self) -> str:
        return f"run '{self.run}' of {self.settings_file}"


def check_output(folder: Path, job: wire.Job) -> str:
    """Why the job's run may not write to the folder; empty if it may. Leaves no traces, and the run may be running."""
    descriptor = _open(folder / OWNER_FILE, 0)
    if descriptor is None:
        return ""
    with os.fdopen(descriptor):
        owner = _owner(job)
        return "" if _recorded(descriptor) == owner else _conflict(descriptor, folder, owner, job)


@contextlib.contextmanager
def claimed(folder: Path | None, job: wire.Job, key: str) -> Iterator[None]:
    """Hold the folder for the job's run, and record the run there. Raises RefusedError if it is another run's.

    `key`: what names the folder. One that cannot be written is not held: the check before the first update reports it.
    """
    descriptor = None if folder is None or not job.settings_file else _made(folder)
    if folder is None or descriptor is None:
        yield
        return
    with os.fdopen(descriptor):  # the lock is held until it is closed
        owner = _owner(job)
        if conflict := _conflict(descriptor, folder, owner, job):
            raise RefusedError(f"{key}: {conflict}")
        if _recorded(descriptor) != owner:
            with contextlib.suppress(OSError):  # a full disk: reported with the results, which need more room
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, msgspec.json.encode(owner) + b"\n", 0)
        yield


def _made(folder: Path) -> int | None:
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    return _open(folder / OWNER_FILE, os.O_CREAT)


def _open(path: Path, flags: int) -> int | None:
    """The owner file; read-only if another user made it, who may share the folder."""
    for mode in (os.O_RDWR | flags, os.O_RDONLY):
        with contextlib.suppress(OSError):
            return os.open(path, mode | os.O_CLOEXEC, 0o644)
    return None


def _owner(job: wire.Job) -> Owner:
    return Owner(job.run, job.settings_file)


def _conflict(descriptor: int, folder: Path, owner: Owner, job: wire.Job) -> str:
    """Lock the owner file; why the folder is not for this owner, or nothing."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        recorded = _recorded(descriptor)
        by = "another process" if recorded is None else str(recorded)
        return f"{folder} is in use by {by}, which is running; {_remedy(folder, job)}"
    except OSError:
        pass  # a file system without locks: the record must suffice
    recorded = _recorded(descriptor)
    if recorded in (None, owner) or _moved(recorded, owner) or not _has_results(descriptor, folder):
        return ""
    keep, overwrite = _remedy(folder, job), f"to overwrite them, delete {folder / OWNER_FILE}"
    return f"{folder} holds the results of {recorded}; to keep them, {keep}; {overwrite}"


def _remedy(folder: Path, job: wire.Job) -> str:
    """How to give this run another folder."""
    if job.task.kind != "mlx_lm":
        return "set Task.export_dir to another folder"
    other = next(
        name for number in itertools.count(2) if not folder.with_name(name := f"{folder.name}-{number}").exists()
    )
    if not job.settings_file.endswith(".toml"):
        return f"add --adapter-path {shlex.quote(other)}"
    table = f"[runs.{json.dumps(job.run) if '.' in job.run else job.run}.task]"
    pair = f"adapter_path = {json.dumps(other)}"
    if any(not origin.startswith("--") for origin in job.task.options_from.values()):
        return f"set {pair} in the options of {table} in {job.settings_file}"
    return f"add options = {{ {pair} }} to {table} in {job.settings_file}"


def _recorded(descriptor: int) -> Owner | None:
    try:
        return msgspec.json.decode(os.pread(descriptor, _LIMIT_BYTES, 0), type=Owner)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        return None


def _moved(recorded: Owner, owner: Owner) -> bool:
    """Whether the recorded run is this one, from before its project's folder was moved."""
    return recorded.run == owner.run and not Path(recorded.settings_file).parent.exists()


def _has_results(descriptor: int, folder: Path) -> bool:
    """Whether something was written to the folder since its owner was recorded."""
    since_ns = os.fstat(descriptor).st_mtime_ns
    with contextlib.suppress(OSError):
        return any(entry.stat().st_mtime_ns > since_ns for entry in folder.iterdir() if entry.name != OWNER_FILE)
    return False
