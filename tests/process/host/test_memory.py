"""The machine's memory: Linux' files and macOS' structures from recorded or constructed bytes, and this machine's."""

import ctypes
import struct
import sys
from pathlib import Path

import psutil
import pytest

from mlx_supervisor.core.events import MemoryPressure
from mlx_supervisor.host import macos_memory, memory

GIB = 2**30


def test_meminfo_is_read_in_bytes_and_what_is_no_amount_is_left_out() -> None:
    text = "MemTotal:       25276064 kB\nHugePages_Total:       3\nActive(anon):  12 kB\nBroken: x kB\n\n"
    assert memory.parse_meminfo(text) == {"MemTotal": 25276064 * 1024, "Active(anon)": 12 * 1024}


def stalls(some: str, full: str) -> str:
    return (
        f"some avg10={some} avg60=99.00 avg300=99.00 total=123\nfull avg10={full} avg60=99.00 avg300=99.00 total=45\n"
    )


@pytest.mark.parametrize(
    ("some", "full", "pressure"),
    [
        ("0.00", "0.00", MemoryPressure.NORMAL),
        ("9.99", "9.99", MemoryPressure.NORMAL),
        ("10.00", "0.00", MemoryPressure.WARN),
        ("100.00", "59.99", MemoryPressure.WARN),
        ("71.20", "60.00", MemoryPressure.CRITICAL),
    ],
)
def test_stall_information_is_judged_by_its_last_ten_seconds(some: str, full: str, pressure: MemoryPressure) -> None:
    assert memory.parse_pressure(stalls(some, full)) is pressure


@pytest.mark.parametrize("text", ["", "\n", "some\n", "some avg10=much avg60=0.00\n", "other avg10=99.00 avg60=1\n"])
def test_stall_information_that_says_nothing_is_no_pressure(text: str) -> None:
    assert memory.parse_pressure(text) is MemoryPressure.NORMAL


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux' files")
def test_a_machine_whose_files_are_missing_is_still_told_of(tmp_path: Path) -> None:
    found = memory.read(tmp_path)
    assert found.available_bytes == pytest.approx(psutil.virtual_memory().available, rel=0.5)
    assert found[1:] == (None, MemoryPressure.NORMAL)
    assert memory.machine_bytes(tmp_path) == psutil.virtual_memory().total


def test_this_machine_has_memory_and_less_of_it_available() -> None:
    assert 0 < memory.read().available_bytes < memory.machine_bytes() <= psutil.virtual_memory().total


# ---- macOS


def swap_usage(total: int, available: int, used: int) -> bytes:
    """A `struct xsw_usage` as it lies in memory: three 64-bit numbers, a 32-bit page size, a 32-bit flag."""
    return struct.pack("<QQQ", total, available, used) + struct.pack("<II", 16384, 1)


def test_swap_is_read_out_of_its_structure() -> None:
    found = macos_memory.parse_swap_usage(swap_usage(3 * GIB, 2 * GIB, GIB))
    assert found == macos_memory.Swap(total=3 * GIB, available=2 * GIB, used=GIB)


@pytest.mark.parametrize("size", [0, 24, 31, 40])
def test_a_structure_of_another_size_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"32 bytes, found {size}"):
        macos_memory.parse_swap_usage(bytes(size))


@pytest.mark.parametrize(
    ("level", "pressure"),
    [(1, MemoryPressure.NORMAL), (2, MemoryPressure.WARN), (4, MemoryPressure.CRITICAL)],
)
def test_the_pressure_level_is_one_of_three(level: int, pressure: MemoryPressure) -> None:
    assert macos_memory.parse_pressure_level(struct.pack("<i", level)) is pressure


@pytest.mark.parametrize("value", [b"", b"\x01", struct.pack("<i", 3), struct.pack("<i", 0)])
def test_any_other_level_is_refused(value: bytes) -> None:
    with pytest.raises(ValueError, match="found"):
        macos_memory.parse_pressure_level(value)


def sysctl(level: int = 1, swap: bytes = b"", compressed: int = 0) -> macos_memory.Sysctl:
    values = {
        "kern.memorystatus_vm_pressure_level": struct.pack("<i", level),
        "vm.swapusage": swap,
        "vm.compressor_bytes_used": struct.pack("<Q", compressed),
    }
    return lambda name: values[name] or None


FULL = swap_usage(8 * GIB, GIB // 8, 8 * GIB - GIB // 8)
ROOM = swap_usage(8 * GIB, 4 * GIB, 4 * GIB)


@pytest.mark.parametrize(
    ("level", "swap", "compressed", "pressure"),
    [
        (1, FULL, 20 * GIB, MemoryPressure.WARN),  # the level has been seen normal with swap full
        (1, ROOM, 20 * GIB, MemoryPressure.NORMAL),
        (1, FULL, 2 * GIB, MemoryPressure.NORMAL),
        (1, swap_usage(0, 0, 0), 20 * GIB, MemoryPressure.NORMAL),  # no swap was ever needed
        (4, FULL, 20 * GIB, MemoryPressure.CRITICAL),
        (9, ROOM, 0, MemoryPressure.NORMAL),
        (4, b"", 0, MemoryPressure.CRITICAL),
        (1, b"short", 20 * GIB, MemoryPressure.NORMAL),
    ],
)
def test_full_swap_is_a_warning_whatever_the_level(
    level: int, swap: bytes, compressed: int, pressure: MemoryPressure
) -> None:
    assert macos_memory.pressure(sysctl(level, swap, compressed), 32 * GIB) is pressure


def test_swap_that_can_not_be_told_is_not_zero() -> None:
    assert macos_memory.swap_used_bytes(sysctl(swap=ROOM)) == 4 * GIB
    assert macos_memory.swap_used_bytes(sysctl(swap=b"short")) is None
    assert macos_memory.swap_used_bytes(lambda name: None) is None


def test_on_macos_the_machine_is_told_of_by_sysctl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(memory, "_sysctl", lambda: sysctl(2, ROOM))
    found = memory.read()
    assert found.available_bytes > 0
    assert found[1:] == (4 * GIB, MemoryPressure.WARN)


class SysctlByName:
    """Stands in for the C library's function: knows swap alone."""

    argtypes: object = None

    def __call__(self, name: bytes, buffer: ctypes.Array[ctypes.c_char], size, new: None, new_size: int) -> int:  # type: ignore[no-untyped-def]
        assert (new, new_size) == (None, 0)
        if name != b"vm.swapusage":
            return -1
        room = size._obj
        assert room.value >= len(ROOM)
        ctypes.memmove(buffer, ROOM, len(ROOM))
        room.value = len(ROOM)
        return 0


def test_sysctl_gives_as_many_bytes_as_the_system_wrote(monkeypatch: pytest.MonkeyPatch) -> None:
    class Libc:
        sysctlbyname = SysctlByName()

    monkeypatch.setattr(ctypes, "CDLL", lambda path: Libc)
    read = macos_memory.libc_sysctl()
    assert read("vm.swapusage") == ROOM
    assert read("vm.nothing") is None
