"""What the operating system charges: the parsers against bytes of the documented layouts, and Linux's for real."""

import ctypes
import os
import struct
import subprocess
import sys

import pytest

from mlx_supervisor import footprint

UUID = bytes(range(16))


def rusage(**at: int) -> bytes:
    """A `rusage_info_v4`: a uuid of 16 bytes, then 35 unsigned 64-bit numbers; all different, but for those named."""
    offsets = {"wired": 56, "resident": 64, "footprint": 72, "lifetime_max": 240, "interval_max": 280}
    buffer = bytearray(UUID + struct.pack("<35Q", *range(1000, 1035)))
    for name, value in at.items():
        struct.pack_into("<Q", buffer, offsets[name], value)
    return bytes(buffer)


def test_the_physical_footprint_is_read_and_not_the_resident_set() -> None:
    found = rusage(wired=1, resident=2**30, footprint=17 * 2**30, lifetime_max=20 * 2**30)
    assert len(found) == 296
    assert footprint.parse_rusage(found) == 17 * 2**30


@pytest.mark.parametrize("size", [0, 232, 295, 297])
def test_a_structure_of_another_version_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"296 bytes, found {size}"):
        footprint.parse_rusage(bytes(size))


class ProcPidRusage:
    """Stands in for libproc's function: knows process 7 alone."""

    argtypes: object = None

    def __call__(self, pid: int, flavor: int, buffer: ctypes.Array[ctypes.c_char]) -> int:
        assert flavor == 4
        if pid != 7:
            return -1
        buffer.raw = rusage(footprint=123_456)
        return 0


class Libproc:
    def __init__(self, path: str, use_errno: bool) -> None:
        assert (path, use_errno) == ("/usr/lib/libproc.dylib", True)
        self.proc_pid_rusage = ProcPidRusage()


def test_libproc_is_asked_for_the_fourth_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", Libproc)
    read = footprint.darwin_footprint()
    assert read(7) == 123_456
    with pytest.raises(ProcessLookupError):
        read(8)


def test_statm_counts_pages() -> None:
    assert footprint.parse_statm(b"57011 4242 1901 1 0 21931 0\n") == 4242 * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_session_and_its_memory_are_seen_for_real() -> None:
    hold = "import os, sys; kept = b'x' * (64 << 20); os.fork(); print(flush=True); sys.stdin.read()"
    process = subprocess.Popen(
        [sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    )
    try:
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.readline()
        members = footprint.session_members(process.pid)
        assert process.pid in members
        assert len(members) == 2
        assert footprint.reader()(process.pid) > 64 << 20
    finally:
        process.communicate()
    with pytest.raises(ProcessLookupError):
        footprint.resident_bytes(process.pid)
