"""The worker's end of the lock of its run's folder: no second worker of the run trains at the same time."""

import os
import socket
import time
from pathlib import Path

import psutil

from mlx_supervisor import wire
from mlx_supervisor.wire.run_lock import LOCK_FILE, HeldError, Holder, Progress, RunLock, read_holder
from mlx_worker.errors import RefusedError

WAIT_S = 5.0
"""How long a worker that was given no lock waits for it."""
POLL_S = 0.05


class HeldRun:
    """The lock, held until the process ends; it notes there how far the generation has trained."""

    def __init__(self, lock: RunLock, generation: int) -> None:
        self._lock, self._generation = lock, generation
        self._resumed: int | None = None

    def trained(self, step: int) -> None:
        """An update was made. The first one tells where the generation began."""
        if self._resumed is None:
            self._resumed = step - 1
        self._lock.progress(Progress(self._generation, self._resumed, step))


def hold(job: wire.Job) -> HeldRun:
    """The lock that the supervisor took for this worker, or else take it. Raises RefusedError when it is held.

    Call it before anything in the folder changes.
    """
    given = os.environ.pop(wire.LOCK_VARIABLE, "")  # a descendant must not mistake other files for it
    lock = _given(given, Path(job.run_dir)) or _taken(Path(job.run_dir), job.generation)
    return HeldRun(lock, job.generation)


def _given(descriptors: str, folder: Path) -> RunLock | None:
    try:
        lock = RunLock.inherited(descriptors)
        files = zip(lock.descriptors, (folder / LOCK_FILE, folder), strict=False)
        same = any(path.exists() and os.path.samestat(os.fstat(each), path.stat()) for each, path in files)
    except (ValueError, OSError):
        return None
    return lock if same else None


def _taken(folder: Path, generation: int) -> RunLock:
    deadline_s = time.monotonic() + WAIT_S
    while True:
        try:
            lock = RunLock.take(folder)
        except HeldError:
            if time.monotonic() < deadline_s:
                time.sleep(POLL_S)
                continue
            holder = read_holder(folder)
            by = "another process" if holder is None else f"process {holder.pid} (generation {holder.generation})"
            raise RefusedError(
                f"{folder} is locked by {by}, which is running: two workers would train one run"
            ) from None
        except OSError as error:
            raise RefusedError(f"{folder / LOCK_FILE} can't be locked: {error.strerror}") from None
        process = psutil.Process()
        lock.record(
            Holder(generation=generation, pid=process.pid, started_s=process.create_time(), host=socket.gethostname())
        )
        return lock
