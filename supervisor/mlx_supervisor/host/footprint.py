"""Memory footprint of a process, and of all processes of a worker, as the operating system counts it."""

import errno
import os
import struct
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from mlx_supervisor.host.process_tree import Processes, read_file

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

Read = Callable[[int], int]


def resident_bytes(pid: int) -> int:
    """Linux: the resident set in bytes.

    Raises ProcessLookupError when the process has ended, reaped or not; OSError when it can't be read; ValueError when
    the contents are malformed.
    """
    try:
        statm = read_file(f"/proc/{pid}/statm")
    except FileNotFoundError:
        os.kill(pid, 0)  # raises ProcessLookupError unless the process exists
        raise
    return parse_statm(statm, pid)


def parse_statm(statm: bytes, pid: int = 0) -> int:
    """The resident set in bytes from /proc/PID/statm (second field, in pages). Raises as `resident_bytes`."""
    fields = statm.split()
    if len(fields) != 7 or not all(each.isdigit() for each in fields):
        raise ValueError(f"/proc/{pid}/statm: found {statm[:80]!r}; expected seven numbers")
    if int(fields[0]) == 0:  # no virtual memory: the process has exited
        raise ProcessLookupError(errno.ESRCH, "has ended", str(pid))
    return int(fields[1]) * _PAGE_BYTES


def proportional_bytes(pid: int) -> int:
    """Linux: the resident set in bytes, each page divided by the number of processes that share it (Pss)."""
    return parse_rollup(read_file(f"/proc/{pid}/smaps_rollup"), pid)


def parse_rollup(rollup: bytes, pid: int = 0) -> int:
    """Pss in bytes from /proc/PID/smaps_rollup. Raises ValueError when there is none."""
    for line in rollup.splitlines():
        fields = line.split()
        if len(fields) == 3 and fields[0] == b"Pss:" and fields[1].isdigit() and fields[2] == b"kB":
            return int(fields[1]) * 1024
    raise ValueError(f"/proc/{pid}/smaps_rollup: found {rollup[:80]!r}; expected a Pss line")


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

    def footprint_bytes(pid: int) -> int:
        buffer = ctypes.create_string_buffer(RUSAGE_INFO_V4_BYTES)
        ctypes.set_errno(0)
        if libproc.proc_pid_rusage(pid, RUSAGE_INFO_V4, buffer) != 0:
            number = ctypes.get_errno() or errno.ESRCH
            raise OSError(number, os.strerror(number), str(pid))  # ESRCH makes it a ProcessLookupError
        return parse_rusage(buffer.raw)

    return footprint_bytes


def readers() -> tuple[Read, Read | None]:
    """This platform's reader of a footprint, and one that counts shared pages once (None: the first does)."""
    return (darwin_footprint(), None) if sys.platform == "darwin" else (resident_bytes, proportional_bytes)


@dataclass(frozen=True, slots=True)
class Footprint:
    """Of all processes of a worker; `children_bytes`: of all but the leader."""

    total_bytes: int
    children_bytes: int
    processes: int


class Gauge:
    """Measures one worker. `readers`: see the function of that name."""

    def __init__(self, processes: Processes, limit_bytes: int, readers: tuple[Read, Read | None]) -> None:
        self._processes = processes
        self._limit_bytes = limit_bytes
        self._read, self._read_shared = readers
        self._shared: dict[int, int] = {}
        self._shared_due_s = 0.0
        self._over_read_s = -OVER_REREAD_S

    def measure(self) -> Footprint | None:
        """None: the leader has ended.

        Raises OSError, ValueError or psutil.Error when any of the processes can't be measured.
        """
        leader = self._processes.leader
        try:
            sizes = {leader: self._read(leader)}
        except ProcessLookupError:
            return None
        self._processes.refresh()
        for pid in list(self._processes.others):
            try:
                sizes[pid] = self._read(pid)
            except ProcessLookupError:
                self._processes.forget(pid)
        for pid, parent in self._processes.newborn():
            sizes[pid] = max(sizes.get(pid, 0) - sizes.get(parent, 0), 0)
        if len(sizes) > 1 and self._read_shared is not None:
            self._subtract_shared(sizes, self._read_shared)
        total = sum(sizes.values())
        return Footprint(total, total - sizes[leader], len(sizes))

    def _subtract_shared(self, sizes: dict[int, int], read: Read) -> None:
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


def _shared(size: int, pid: int, read: Read) -> int:
    """Bytes that other processes share. 0 when that can't be read: the footprint is then overestimated."""
    try:
        return max(size - read(pid), 0)
    except (OSError, ValueError):
        return 0


_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
