"""What the operating system charges to one process, and which processes make up a session. One seam per platform."""

import os
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import psutil

from mlx_supervisor.machine_memory import machine_bytes as machine_bytes

RUSAGE_INFO_V4 = 4
RUSAGE_INFO_V4_BYTES = 296
PHYS_FOOTPRINT_OFFSET = 72
"""Of `struct rusage_info_v4`: a 16-byte uuid, then 35 unsigned 64-bit numbers; phys_footprint is the eighth."""


def resident_bytes(pid: int) -> int:
    """Linux: the resident set in bytes. Raises ProcessLookupError when there is no such process."""
    try:
        statm = Path(f"/proc/{pid}/statm").read_bytes()
    except OSError as error:
        raise ProcessLookupError(pid) from error
    return parse_statm(statm)


def parse_statm(statm: bytes) -> int:
    """The resident set in bytes out of /proc/PID/statm (its second field, in pages)."""
    return int(statm.split()[1]) * _PAGE_BYTES


def parse_rusage(buffer: bytes) -> int:
    """phys_footprint in bytes out of a `rusage_info_v4`. Raises ValueError on a buffer of another length."""
    if len(buffer) != RUSAGE_INFO_V4_BYTES:
        raise ValueError(f"rusage_info_v4 has {RUSAGE_INFO_V4_BYTES} bytes, found {len(buffer)}")
    (footprint,) = struct.unpack_from("<Q", buffer, PHYS_FOOTPRINT_OFFSET)
    return int(footprint)


def darwin_footprint() -> Callable[[int], int]:
    """macOS: phys_footprint through libproc (the resident set misses most Metal memory). Raises OSError without it."""
    import ctypes

    libproc = ctypes.CDLL("/usr/lib/libproc.dylib", use_errno=True)
    libproc.proc_pid_rusage.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_void_p]

    def footprint_bytes(pid: int) -> int:
        buffer = ctypes.create_string_buffer(RUSAGE_INFO_V4_BYTES)
        if libproc.proc_pid_rusage(pid, RUSAGE_INFO_V4, buffer) != 0:
            raise ProcessLookupError(pid)
        return parse_rusage(buffer.raw)

    return footprint_bytes


def reader() -> Callable[[int], int]:
    """The footprint function of this platform."""
    return darwin_footprint() if sys.platform == "darwin" else resident_bytes


def session_members(session: int) -> list[int]:
    """The ids of all processes in a session, which is what a worker's group and its children's are."""
    members = []
    for pid in psutil.pids():
        try:
            if os.getsid(pid) == session:
                members.append(pid)
        except OSError:
            continue
    return members


_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
