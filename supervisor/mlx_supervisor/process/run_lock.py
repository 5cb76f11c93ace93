"""The lock of a run's folder, for the supervisor: taken before every start; another process that holds it is ended."""

import asyncio
import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

from mlx_supervisor.host.boot_id import boot_id
from mlx_supervisor.process.orphans import ORPHANS_WAIT_S, POLL_S, is_running, kill_group, kill_orphans, wake
from mlx_supervisor.wire import TOKEN_VARIABLE
from mlx_supervisor.wire.run_lock import HeldError, Holder, RunLock, is_held, read_holder

BLOCKED_POLL_S = 1.0
"""How often a lock is tested whose holder can't be ended."""
UNKNOWN_GRACE_S = 3.0
"""How long a holder that is not found may keep the lock before starts are reported as blocked."""


def take(folder: Path) -> RunLock:
    """The lock of a run's folder, without waiting. Raises HeldError while another process holds it, and OSError."""
    holder = read_holder(folder)
    lock = RunLock.take(folder)
    if not lock.supported and holder is not None and _runs(holder):
        lock.close()
        raise HeldError
    return lock


def held(folder: Path) -> bool:
    """Whether a process holds the lock; without locks, whether the recorded process runs. Raises OSError."""
    locked = is_held(folder)
    if locked is None:
        holder = read_holder(folder)
        return holder is not None and _runs(holder)
    return locked


def holder(generation: int, token: str, pid: int = 0, started_s: float = 0.0) -> Holder:
    """The record of a worker of this supervisor."""
    return Holder(
        generation=generation, pid=pid, started_s=started_s, token=token, host=socket.gethostname(), boot=boot_id()
    )


def _runs(holder: Holder) -> bool:
    return holder.host == socket.gethostname() and holder.pid > 0 and is_running(holder.pid, holder.started_s)


async def end_holder(folder: Path, grace_s: float, hurried: Callable[[], bool], blocked: Callable[[str], None]) -> bool:
    """Wait until no process holds the lock, and kill the holder after `grace_s` seconds or once `hurried` returns True.

    `blocked` is called once, with the reason, if the holder can't be ended: the lock is then tested until it is free.
    Returns False if `hurried` ended that wait.
    """
    deadline_s = time.monotonic() + grace_s
    reported, poll_s = False, POLL_S
    found = await asyncio.to_thread(_workers_of, folder)
    for process in found:
        wake(process)
    if not found:
        deadline_s = min(deadline_s, time.monotonic() + UNKNOWN_GRACE_S)
    while held(folder):
        if time.monotonic() >= deadline_s or hurried():
            await _kill(folder)
            if not held(folder):
                break
            if not reported:
                reported, poll_s = True, BLOCKED_POLL_S
                blocked(_reason(folder))
            if hurried():
                return False
        await asyncio.sleep(poll_s)
    return True


async def _kill(folder: Path) -> None:
    """SIGKILL the holders and everything with their tokens, and wait for their end for a while."""
    deadline_s = time.monotonic() + ORPHANS_WAIT_S
    while found := await asyncio.to_thread(_workers_of, folder):
        for process in found:
            token = _token(process)
            with suppress(psutil.Error, OSError):
                if os.getpgid(process.pid) == process.pid and process.is_running():
                    kill_group(process.pid)
                process.kill()
            if token:
                await kill_orphans(0, token, group=False)
        if time.monotonic() >= deadline_s:
            return
        await asyncio.sleep(POLL_S)


def _workers_of(folder: Path) -> list[psutil.Process]:
    """Workers of this run: the recorded process, those with its token, and workers with this run's job."""
    record, job = read_holder(folder), str(folder / "job.json")
    here = record is not None and record.host == socket.gethostname()
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.pid == os.getpid() or process.status() == psutil.STATUS_ZOMBIE:
                continue
            if process.uids().real != os.getuid():
                continue
            recorded = here and record is not None and process.pid == record.pid
            if recorded and record is not None and is_running(record.pid, record.started_s):
                found.append(process)
                continue
            token = _token(process)
            known = record is not None and token != "" and token == record.token
            if known or (token and job in process.cmdline()):
                found.append(process)
    return found


def _token(process: psutil.Process) -> str:
    try:
        return str(process.environ().get(TOKEN_VARIABLE, ""))
    except (psutil.Error, OSError, SystemError):  # macOS hides some environments
        return ""


def _reason(folder: Path) -> str:
    record, place = read_holder(folder), f"{folder} is locked by"
    if record is not None and record.host not in ("", socket.gethostname()):
        return f"{place} generation {record.generation} on host {record.host} (process {record.pid}); stop it there"
    if record is not None and _runs(record):
        return f"{place} generation {record.generation} (process {record.pid}), which survived SIGKILL"
    return f"{place} another process; find it with `lsof {folder}` and end it"
