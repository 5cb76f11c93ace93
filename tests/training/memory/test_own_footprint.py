"""The worker's reading of its own memory."""

import os
import struct

import psutil
import pytest

from mlx_worker.memory.own_footprint import OwnFootprint, parse_rusage, parse_statm

PAGE = os.sysconf("SC_PAGE_SIZE")
MIB = 2**20


def test_a_reading_follows_what_the_process_allocates() -> None:
    own = OwnFootprint()
    resident, footprint = own.read()
    assert resident == pytest.approx(psutil.Process().memory_info().rss, abs=8 * MIB)
    kept = bytearray(b"\x01") * (64 * MIB)
    more_resident, more_footprint = own.read()
    assert more_resident - resident == pytest.approx(len(kept), abs=4 * MIB)
    assert more_footprint - footprint == pytest.approx(len(kept), abs=4 * MIB)


def test_pages_of_files_are_not_in_the_footprint() -> None:
    assert parse_statm(b"90000 700 300 1 0 650 0\n") == (700 * PAGE, 400 * PAGE)


@pytest.mark.parametrize("statm", [b"", b"1 2", b"1 x 3 4 5 6 7", b"-1 2 3"])
def test_a_malformed_reading_is_unknown(statm: bytes) -> None:
    assert parse_statm(statm) == (0, 0)


def test_macos_physical_footprint_is_the_eighth_number() -> None:
    assert parse_rusage(bytes(16) + struct.pack("<35Q", *range(100, 135))) == 107
