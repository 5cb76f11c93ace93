"""Ends orphans: processes that a dead worker or a dead supervisor left running."""

import asyncio
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress

import psutil

from mlx_supervisor.wire import TOKEN_VARIABLE

ORPHANS_WAIT_S = 5.0
"""How long to wait for killed processes to end."""
POLL_S = 0.02


async def end_orphaned_worker(
    pid: int, create_time_s: float, token: str, grace_s: float, hurried: Callable[[], bool] = lambda: False
) -> bool:
    """End a dead supervisor's worker: it has `grace_s` seconds to checkpoint and exit, and is killed then.

    `hurried` returning True ends the grace period. Returns whether anything was killed. A pid may have been reused:
    the start time or the token has to match. `pid` 0: the supervisor died before it recorded the pid.
    """
    if pid == 0:
        return await _end_by_token(token, grace_s, hurried)
    deadline_s = time.monotonic() + grace_s
    if is_running(pid, create_time_s):
        with suppress(psutil.Error):
            wake(psutil.Process(pid))
    while is_running(pid, create_time_s):
        if hurried() or time.monotonic() >= deadline_s:
            kill_group(pid)
            await kill_orphans(pid, token)
            return True
        await asyncio.sleep(POLL_S)
    return await kill_orphans(pid, token, group=False)


async def _end_by_token(token: str, grace_s: float, hurried: Callable[[], bool]) -> bool:
    deadline_s = time.monotonic() + grace_s
    while await _find_orphans(0, token, group=False) and not hurried() and time.monotonic() < deadline_s:
        await asyncio.sleep(10 * POLL_S)
    return await kill_orphans(0, token, group=False)


async def kill_orphans(pid: int, token: str, group: bool = True) -> bool:
    """SIGKILL every process with the worker's token or in its process group. Returns whether there was any.

    `group` False: match the token only, as the leader died long ago and its pid may have been reused.
    """
    deadline_s = time.monotonic() + ORPHANS_WAIT_S
    found = False
    while orphans := await _find_orphans(pid, token, group):
        found = True
        for process in orphans:
            with suppress(psutil.Error):
                process.kill()
        if time.monotonic() >= deadline_s:
            break
        await asyncio.sleep(POLL_S)
    return found


async def _find_orphans(pid: int, token: str, group: bool) -> list[psutil.Process]:
    """In a thread: it takes a while with thousands of processes, and must not block the event loop."""
    return await asyncio.to_thread(_scan, pid, token, group)


def _scan(pid: int, token: str, group: bool) -> list[psutil.Process]:
    mark = (TOKEN_VARIABLE, token)
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid == os.getpid() or process.status() == psutil.STATUS_ZOMBIE:
                continue
            in_group = group and os.getpgid(process.pid) == pid
            if in_group or (process.uids().real == os.getuid() and mark in process.environ().items()):
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def is_running(pid: int, create_time_s: float) -> bool:
    """Whether the process still runs; a pid may have been reused by a later one."""
    try:
        process = psutil.Process(pid)
        return abs(process.create_time() - create_time_s) < 1.0 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def wake(process: psutil.Process) -> None:
    """Continue a process that was stopped (SIGSTOP): it sees that its supervisor died, saves a checkpoint and exits."""
    with suppress(psutil.Error):
        if process.status() == psutil.STATUS_STOPPED:
            process.send_signal(signal.SIGCONT)


def kill_group(pid: int) -> None:
    """SIGKILL to the process group of this leader. Does nothing when it has ended."""
    with suppress(ProcessLookupError, PermissionError):  # macOS refuses permission for a group of zombies
        os.killpg(pid, signal.SIGKILL)
