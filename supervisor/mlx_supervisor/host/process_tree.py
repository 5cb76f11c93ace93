"""The processes of a worker: its session, and descendants outside it that still carry its token."""

import os
import sys
import time
from functools import cache
from pathlib import Path

import psutil

from mlx_supervisor.wire import TOKEN_VARIABLE

SCAN_INTERVAL_S = 1.0
"""How often the process list is read when the kernel reports no new process."""
SCAN_SHARE = 0.05
"""Reading the list takes at most this share of the time, however many processes there are."""
RESCAN_INTERVAL_S = 30.0
"""How often all processes are checked again: a pid may have been reused."""
NEWBORN_S = 0.5
"""For this long after a fork, a process that has not called exec counts only memory beyond its parent's."""
PF_FORKNOEXEC = 0x40
"""Flag in /proc/PID/stat: forked, but no exec yet (the kernel's include/linux/sched.h)."""
SHORT_BYTES = 4096


class Processes:
    """The processes of one worker. `others`: all but its leader, as of the last `refresh`."""

    def __init__(self, leader: int, token: str = "") -> None:
        self.leader = leader
        self.others: list[int] = []
        self._mark = f"\0{TOKEN_VARIABLE}={token}\0".encode() if token else None
        self._known: set[int] = set()
        self._grown: set[int] = set()
        self._last_started = 0
        self._due_s = self._allowed_s = self._rescan_s = 0.0

    def refresh(self) -> None:
        """Update the list: once a second, and sooner when the kernel has started a process.

        Raises OSError when the processes can't be listed.
        """
        now_s, started = time.monotonic(), last_started()
        if now_s < self._due_s and (started == self._last_started or now_s < self._allowed_s):
            return
        if now_s >= self._rescan_s:
            self._rescan_s = now_s + RESCAN_INTERVAL_S
            self._known, self._grown, self.others = set(), set(), []
        self._scan(set(psutil.pids()))
        took_s = time.monotonic() - now_s
        self._last_started = started
        self._due_s, self._allowed_s = now_s + SCAN_INTERVAL_S, now_s + took_s / SCAN_SHARE

    def forget(self, pid: int) -> None:
        """Remove a process that has ended."""
        if pid in self.others:
            self.others.remove(pid)

    def newborn(self) -> list[tuple[int, int]]:
        """Others between fork and exec, each with its parent: they share (vfork) or copy its memory."""
        parents = {pid: _parent_of_newborn(pid) for pid in self.others if pid not in self._grown}
        self._grown |= {pid for pid, parent in parents.items() if parent is None}
        return [(pid, parent) for pid, parent in parents.items() if parent is not None]

    def _scan(self, alive: set[int]) -> None:
        """Only new processes are checked: others do not change."""
        new = sorted(alive - self._known - {self.leader, os.getpid()})
        self.others = [pid for pid in self.others if pid in alive] + [pid for pid in new if self._belongs(pid)]
        self._known = alive
        self._grown &= alive

    def _belongs(self, pid: int) -> bool:
        try:
            return os.getsid(pid) == self.leader or (self._mark is not None and self._mark in _environment(pid))
        except (OSError, psutil.Error):  # it has ended, or is another user's
            return False


def last_started() -> int:
    """Linux: the id of the process or thread that was started last. 0 where that can't be read."""
    try:
        return int(_loadavg().read().rsplit(maxsplit=1)[-1])
    except (OSError, ValueError, IndexError):
        return 0


def read_file(path: str) -> bytes:
    """A short file of /proc, eight times faster than pathlib. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(descriptor, SHORT_BYTES)
    finally:
        os.close(descriptor)


class ProcFile:
    """A file of /proc that is opened once and read repeatedly; closed with the object. Raises OSError.

    Reading waits for the interpreter's lock once, where `read_file` waits three times. After the process is reaped, it
    raises ProcessLookupError, even if the pid is reused.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self) -> bytes:
        """The contents, or their first 4 KiB."""
        return os.pread(self._descriptor, SHORT_BYTES, 0)

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)


@cache
def _loadavg() -> ProcFile:
    return ProcFile("/proc/loadavg")


def _parent_of_newborn(pid: int) -> int | None:
    """Linux, from /proc/PID/stat (proc_pid_stat(5)): the parent of a newborn. None: not a newborn, or unreadable."""
    try:
        fields = read_file(f"/proc/{pid}/stat").rpartition(b")")[2].split()
        parent, flags, started_ticks = int(fields[1]), int(fields[6]), int(fields[19])
    except (OSError, ValueError, IndexError):
        return None
    age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - started_ticks / os.sysconf("SC_CLK_TCK")
    return parent if flags & PF_FORKNOEXEC and age_s < NEWBORN_S else None


def _environment(pid: int) -> bytes:
    """NAME=VALUE of each variable, between zero bytes. Raises OSError or psutil.Error."""
    return _of_proc(pid) if sys.platform == "linux" else _of_psutil(pid)


def _of_proc(pid: int) -> bytes:
    return b"\0" + Path(f"/proc/{pid}/environ").read_bytes() + b"\0"


def _of_psutil(pid: int) -> bytes:
    return "".join(f"\0{name}={value}\0" for name, value in psutil.Process(pid).environ().items()).encode()
