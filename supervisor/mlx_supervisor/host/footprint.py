"""What the operating system charges to one process, and to all of a worker's. One seam per platform."""

import errno
import os
import struct
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from mlx_supervisor.host.memory import machine_bytes as machine_bytes
from mlx_supervisor.host.process_tree import Processes, read_file

RUSAGE_INFO_V4 = 4
RUSAGE_INFO_V4_BYTES = 296
PHYS_FOOTPRINT_OFFSET = 72
"""Of `struct rusage_info_v4`: a 16-byte uuid, then 35 unsigned 64-bit numbers; phys_footprint is the eighth."""
SHORT_SHARE = 0.85
"""From this share of the limit on, pages that several processes share have to be counted once only."""
SHARED_INTERVAL_S = 0.5
"""How often what is shared is read anew below the limit: it costs some 3 ms a GiB, ..."""
SHARED_SHARE = 0.02
"""... and at most this share of the time goes into it."""
PROVEN_S = 0.1
"""Over the limit by a reading so recent, what was shared then is taken to be shared now."""

Read = Callable[[int], int]


def resident_bytes(pid: int) -> int:
    """Linux: the resident set in bytes.

    Raises ProcessLookupError when the process has ended, also when it was not yet reaped; OSError when it can't be
    read, ValueError when what was read makes no sense.
    """
    try:
        statm = read_file(f"/proc/{pid}/statm")
    except FileNotFoundError:
        os.kill(pid, 0)  # no such process; if there is, something else is amiss
        raise
    return parse_statm(statm, pid)


def parse_statm(statm: bytes, pid: int = 0) -> int:
    """The resident set in bytes out of /proc/PID/statm (its second field, in pages). Raises as `resident_bytes`."""
    fields = statm.split()
    if len(fields) != 7 or not all(each.isdigit() for each in fields):
        raise ValueError(f"/proc/{pid}/statm: found {statm[:80]!r}, seven numbers were expected")
    if int(fields[0]) == 0:  # a program has at least its own text; this one has given everything back
        raise ProcessLookupError(errno.ESRCH, "has ended", str(pid))
    return int(fields[1]) * _PAGE_BYTES


def proportional_bytes(pid: int) -> int:
    """Linux: the resident set in bytes, each page divided by the number of processes that share it. Raises likewise."""
    return parse_rollup(read_file(f"/proc/{pid}/smaps_rollup"), pid)


def parse_rollup(rollup: bytes, pid: int = 0) -> int:
    """Pss in bytes out of /proc/PID/smaps_rollup. Raises ValueError when it has none."""
    for line in rollup.splitlines():
        fields = line.split()
        if len(fields) == 3 and fields[0] == b"Pss:" and fields[1].isdigit() and fields[2] == b"kB":
            return int(fields[1]) * 1024
    raise ValueError(f"/proc/{pid}/smaps_rollup: found {rollup[:80]!r}, a line of Pss was expected")


def parse_rusage(buffer: bytes) -> int:
    """phys_footprint in bytes out of a `rusage_info_v4`. Raises ValueError on a buffer of another length."""
    if len(buffer) != RUSAGE_INFO_V4_BYTES:
        raise ValueError(f"rusage_info_v4 has {RUSAGE_INFO_V4_BYTES} bytes, found {len(buffer)}")
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
    """This platform's footprint of a process, and the one that counts shared pages once; None: the first does."""
    return (darwin_footprint(), None) if sys.platform == "darwin" else (resident_bytes, proportional_bytes)


@dataclass(frozen=True, slots=True)
class Footprint:
    """Of all of a worker's processes; `children_bytes` is what is not the leader's."""

    total_bytes: int
    children_bytes: int
    processes: int


class Gauge:
    """Measures one worker. `readers`: as the function of that name gives them."""

    def __init__(self, processes: Processes, limit_bytes: int, readers: tuple[Read, Read | None]) -> None:
        self._processes = processes
        self._limit_bytes = limit_bytes
        self._read, self._read_shared = readers
        self._shared: dict[int, int] = {}
        self._shared_due_s = 0.0
        self._proven_s = -PROVEN_S

    def measure(self) -> Footprint | None:
        """None: the leader has ended, and there is nothing to measure.

        Raises OSError, ValueError or psutil.Error when any process can't be measured: a sum without it says nothing.
        """
        leader = self._processes.leader
        try:
            sizes = {leader: self._read(leader)}
        except ProcessLookupError:
            return None
        self._processes.look()
        for pid in list(self._processes.others):
            try:
                sizes[pid] = self._read(pid)
            except ProcessLookupError:
                self._processes.forget(pid)
        for pid, parent in self._processes.newborn():
            sizes[pid] = max(sizes.get(pid, 0) - sizes.get(parent, 0), 0)
        if len(sizes) > 1 and self._read_shared is not None:
            self._take_off_shared(sizes, self._read_shared)
        total = sum(sizes.values())
        return Footprint(total, total - sizes[leader], len(sizes))

    def _take_off_shared(self, sizes: dict[int, int], read: Read) -> None:
        """Where headroom is short. Below the limit what was shared lately will do; over it, only what is shared now."""
        if sum(sizes.values()) <= SHORT_SHARE * self._limit_bytes:
            return
        now_s = time.monotonic()
        fresh_until_s = self._proven_s + PROVEN_S if self._over(sizes) else self._shared_due_s
        if now_s >= fresh_until_s:
            self._shared = {pid: _shared(size, pid, read) for pid, size in sizes.items()}
            took_s = time.monotonic() - now_s
            self._shared_due_s = now_s + max(SHARED_INTERVAL_S, took_s / SHARED_SHARE)
            if self._over(sizes):
                self._proven_s = now_s
        for pid, size in sizes.items():
            sizes[pid] = max(size - self._shared.get(pid, 0), 0)

    def _over(self, sizes: dict[int, int]) -> bool:
        return sum(max(size - self._shared.get(pid, 0), 0) for pid, size in sizes.items()) > self._limit_bytes


def _shared(size: int, pid: int, read: Read) -> int:
    """What other processes have of it. Where that can't be told, nothing: better too much than unnoticed."""
    try:
        return max(size - read(pid), 0)
    except (OSError, ValueError):
        return 0


_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
