"""Memory footprint of a process, and of all processes of a worker: what the operating system can't take back from them.

Linux: anonymous memory, shared memory and swap. Clean pages of files are cache: counted apart, and not charged.
"""

import errno
import os
import re
import struct
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from mlx_supervisor.host.process_tree import Processes, ProcFile

RUSAGE_INFO_V4 = 4
RUSAGE_INFO_V4_BYTES = 296
PHYS_FOOTPRINT_OFFSET = 72
"""In `struct rusage_info_v4`: a 16-byte uuid, then 35 unsigned 64-bit numbers; phys_footprint is the eighth."""
SHORT_SHARE = 0.85
"""Above this share of the limit, pages shared by several processes are counted once."""
SHARED_INTERVAL_S = 0.5
"""How often shared pages are read below the limit (it takes about 3 ms per GiB), ..."""
SHARED_SHARE = 0.02
"""... for at most this share of the time."""
OVER_REREAD_S = 0.1
"""While over the limit, shared pages are reread when the last reading is older than this."""
FILES_AT_MOST = 16
"""Processes of one worker whose file in /proc stays open."""
_STATUS = re.compile(rb"^(State|VmLck|VmRSS|RssAnon|RssFile|RssShmem|VmSwap):\s+(\w+)", re.MULTILINE)
_ROLLUP = re.compile(rb"^(Pss|Pss_Anon|Pss_File|Pss_Shmem|SwapPss|Locked):\s+(\d+) kB$", re.MULTILINE)


class Memory(NamedTuple):
    """Of one process. `file_bytes`: resident pages of files that are not charged, as the kernel can take them back."""

    charged_bytes: int
    file_bytes: int = 0


Read = Callable[[int], Memory]
ReadShared = Callable[[int], int]


class StatusReader:
    """Linux: reads /proc/PID/status, and keeps the file open.

    Raises ProcessLookupError when the process has ended, reaped or not; OSError when it can't be read; ValueError when
    the contents are malformed.
    """

    def __init__(self) -> None:
        self._files: dict[int, ProcFile] = {}

    def __call__(self, pid: int) -> Memory:
        try:
            return parse_status(self._file(pid).read(), pid)
        except ProcessLookupError:
            self._files.pop(pid, None)
            raise

    def _file(self, pid: int) -> ProcFile:
        file = self._files.get(pid)
        if file is None:
            try:
                file = ProcFile(f"/proc/{pid}/status")
            except FileNotFoundError:
                os.kill(pid, 0)  # raises ProcessLookupError unless the process exists
                raise
            if len(self._files) < FILES_AT_MOST:
                self._files[pid] = file
        return file


def parse_status(status: bytes, pid: int = 0) -> Memory:
    """Memory from /proc/PID/status (proc_pid_status(5)). Raises as `StatusReader`.

    Locked pages of a file can't be taken back, and are charged. A kernel that doesn't divide the resident set (before
    4.5, or a substitute for one) has all of it charged.
    """
    found = dict(_STATUS.findall(status))
    if b"VmRSS" not in found and found.get(b"State") is not None:  # no virtual memory: the process has exited
        raise ProcessLookupError(errno.ESRCH, "has ended", str(pid))
    try:
        sizes = {name: int(value) * 1024 for name, value in found.items() if name != b"State"}
        swap = sizes.get(b"VmSwap", 0)
        if b"RssAnon" not in sizes:
            return Memory(sizes[b"VmRSS"] + swap)
        file, locked = sizes[b"RssFile"], sizes.get(b"VmLck", 0)
        charged = sizes[b"RssAnon"] + sizes[b"RssShmem"] + swap + min(file, locked)
    except (KeyError, ValueError):
        raise ValueError(f"/proc/{pid}/status: found {status[-80:]!r}; expected VmRSS, RssAnon, …") from None
    return Memory(charged, file - min(file, locked))


def proportional_bytes(pid: int) -> int:
    """Linux: what is charged of a process, each page divided by the number of processes that share it (Pss)."""
    return parse_rollup(ProcFile(f"/proc/{pid}/smaps_rollup").read(), pid)


def parse_rollup(rollup: bytes, pid: int = 0) -> int:
    """Charged bytes from /proc/PID/smaps_rollup; before Linux 5.1, all of Pss. Raises ValueError when there is none."""
    sizes = {name: int(value) * 1024 for name, value in _ROLLUP.findall(rollup)}
    if b"Pss" not in sizes:
        raise ValueError(f"/proc/{pid}/smaps_rollup: found {rollup[:80]!r}; expected a Pss line")
    swap = sizes.get(b"SwapPss", 0)
    if b"Pss_Anon" not in sizes:
        return sizes[b"Pss"] + swap
    locked = min(sizes.get(b"Pss_File", 0), sizes.get(b"Locked", 0))
    return sizes[b"Pss_Anon"] + sizes.get(b"Pss_Shmem", 0) + swap + locked


def parse_rusage(buffer: bytes) -> int:
    """phys_footprint in bytes from a `rusage_info_v4`. Raises ValueError for any other length."""
    if len(buffer) != RUSAGE_INFO_V4_BYTES:
        raise ValueError(f"rusage_info_v4: found {len(buffer)} bytes; expected {RUSAGE_INFO_V4_BYTES}")
    (footprint,) = struct.unpack_from("<Q", buffer, PHYS_FOOTPRINT_OFFSET)
    return int(footprint)


def darwin_footprint() -> Read:
    """macOS: phys_footprint through libproc (the resident set misses most Metal memory). Raises OSError without it."""
    import ctypes

    libproc = ctypes.CDLL("/usr/lib/libproc.dylib", use_errno=True)
    libproc.proc_pid_rusage.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_void_p]

    def footprint(pid: int) -> Memory:
        buffer = ctypes.create_string_buffer(RUSAGE_INFO_V4_BYTES)
        ctypes.set_errno(0)
        if libproc.proc_pid_rusage(pid, RUSAGE_INFO_V4, buffer) != 0:
            number = ctypes.get_errno() or errno.ESRCH
            raise OSError(number, os.strerror(number), str(pid))  # ESRCH makes it a ProcessLookupError
        return Memory(parse_rusage(buffer.raw))

    return footprint


def readers() -> tuple[Read, ReadShared | None]:
    """This platform's reader of a footprint, and one that counts shared pages once (None: the first does)."""
    return (darwin_footprint(), None) if sys.platform == "darwin" else (StatusReader(), proportional_bytes)


@dataclass(frozen=True, slots=True)
class Footprint:
    """Of all processes of a worker; `children_bytes`: of all but the leader.

    `file_cache_bytes`: pages of files, which are not part of the total; of the process that has most of them, as
    several may have the same ones.
    """

    total_bytes: int
    children_bytes: int
    processes: int
    file_cache_bytes: int = 0


class Gauge:
    """Measures one worker. `readers`: see the function of that name."""

    def __init__(self, processes: Processes, limit_bytes: int, readers: tuple[Read, ReadShared | None]) -> None:
        self._processes = processes
        self._limit_bytes = limit_bytes
        self._read, self._read_shared = readers
        self._shared: dict[int, int] = {}
        self._shared_due_s = 0.0
        self._over_read_s = -OVER_REREAD_S
        self._last_bytes = 0

    def measure(self) -> Footprint | None:
        """None: the leader has ended.

        Raises OSError, ValueError or psutil.Error when any of the processes can't be measured.
        """
        leader = self._processes.leader
        try:
            sizes = {leader: (found := self._read(leader)).charged_bytes}
        except ProcessLookupError:
            return None
        file_bytes = found.file_bytes
        if self._last_bytes <= self._limit_bytes:  # else this sample decides, and must not be late
            self._processes.refresh()
        for pid in list(self._processes.others):
            try:
                found = self._read(pid)
            except ProcessLookupError:
                self._processes.forget(pid)
            else:
                sizes[pid], file_bytes = found.charged_bytes, max(file_bytes, found.file_bytes)
        for pid, parent in self._processes.newborn():
            sizes[pid] = max(sizes.get(pid, 0) - sizes.get(parent, 0), 0)
        if len(sizes) > 1 and self._read_shared is not None:
            self._subtract_shared(sizes, self._read_shared)
        total = self._last_bytes = sum(sizes.values())
        return Footprint(total, total - sizes[leader], len(sizes), file_bytes)

    def _subtract_shared(self, sizes: dict[int, int], read: ReadShared) -> None:
        """Near the limit only. Below it, the last reading of shared pages is good for a while; over it, a fresh one."""
        if sum(sizes.values()) <= SHORT_SHARE * self._limit_bytes:
            return
        now_s = time.monotonic()
        fresh_until_s = self._over_read_s + OVER_REREAD_S if self._over(sizes) else self._shared_due_s
        if now_s >= fresh_until_s:
            self._shared = {pid: _shared(size, pid, read) for pid, size in sizes.items()}
            took_s = time.monotonic() - now_s
            self._shared_due_s = now_s + max(SHARED_INTERVAL_S, took_s / SHARED_SHARE)
            if self._over(sizes):
                self._over_read_s = now_s
        for pid, size in sizes.items():
            sizes[pid] = max(size - self._shared.get(pid, 0), 0)

    def _over(self, sizes: dict[int, int]) -> bool:
        return sum(max(size - self._shared.get(pid, 0), 0) for pid, size in sizes.items()) > self._limit_bytes


def _shared(size: int, pid: int, read: ReadShared) -> int:
    """Bytes that other processes share. 0 when that can't be read: the footprint is then overestimated."""
    try:
        return max(size - read(pid), 0)
    except (OSError, ValueError):
        return 0


_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
