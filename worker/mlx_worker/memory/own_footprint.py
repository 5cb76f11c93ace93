"""The footprint of this process, read by itself: cheap enough for every update.

On Linux the anonymous part of the resident set, on macOS the physical footprint. The supervisor measures all of the
worker from outside; this reading only tells it how memory moved between two of its samples.
"""

import ctypes
import os
import struct
import sys

import psutil

RUSAGE_INFO_V4 = 4
RUSAGE_INFO_V4_BYTES = 296
PHYS_FOOTPRINT_OFFSET = 72
"""In `struct rusage_info_v4` (macOS): a 16-byte uuid, then 35 unsigned 64-bit numbers; phys_footprint is the eighth."""
STATM_BYTES = 256
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class OwnFootprint:
    """Reads this process's memory. Where that is not possible, every reading is 0."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._statm = -1
        self._libproc: ctypes.CDLL | None = None
        try:
            if sys.platform == "darwin":
                self._libproc = ctypes.CDLL("/usr/lib/libproc.dylib")
            else:
                self._statm = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            pass

    def read(self) -> tuple[int, int]:
        """The resident set and the footprint, in bytes."""
        if self._statm >= 0:
            return parse_statm(os.pread(self._statm, STATM_BYTES, 0))  # 3 µs; psutil takes 12
        try:
            resident_bytes = int(self._process.memory_info().rss)
        except psutil.Error:
            resident_bytes = 0
        return resident_bytes, self._physical_bytes()

    def _physical_bytes(self) -> int:
        if self._libproc is None:
            return 0
        buffer = ctypes.create_string_buffer(RUSAGE_INFO_V4_BYTES)
        failed = self._libproc.proc_pid_rusage(os.getpid(), RUSAGE_INFO_V4, buffer)
        return 0 if failed else parse_rusage(buffer.raw)


def parse_statm(statm: bytes) -> tuple[int, int]:
    """The resident set and its anonymous part, in bytes, from /proc/self/statm; zeros if it is malformed."""
    fields = statm.split()
    if len(fields) < 3 or not all(each.isdigit() for each in fields[:3]):
        return 0, 0
    resident, shared = int(fields[1]), int(fields[2])
    return resident * _PAGE_BYTES, max(resident - shared, 0) * _PAGE_BYTES


def parse_rusage(buffer: bytes) -> int:
    """phys_footprint in bytes from a `rusage_info_v4`."""
    return int(struct.unpack_from("<Q", buffer, PHYS_FOOTPRINT_OFFSET)[0])
