"""The machine's memory: files of Linux and structures of macOS from constructed bytes, and this machine's."""

import ctypes
import struct
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from mlx_supervisor.core.events import MemoryPressure
from mlx_supervisor.host import macos_memory, memory

GIB = 2**30


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
def test_malformed_stall_information_is_no_pressure(text: str) -> None:
    assert memory.parse_pressure(text) is MemoryPressure.NORMAL


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux' files")
def test_a_kernel_without_stall_information_and_groups_is_read(tmp_path: Path) -> None:
    found = memory.read(tmp_path)
    assert found.available_bytes == pytest.approx(psutil.virtual_memory().available, rel=0.5)
    assert found.pressure is MemoryPressure.NORMAL
    assert memory.machine_bytes(tmp_path) == psutil.virtual_memory().total


def test_this_machine_has_less_memory_available_than_in_total() -> None:
    assert 0 < memory.read().available_bytes < memory.machine_bytes() <= psutil.virtual_memory().total


# ---- macOS


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


def sysctl(level: int, compressed: int) -> macos_memory.Sysctl:
    values = {
        "kern.memorystatus_vm_pressure_level": struct.pack("<i", level),
        "vm.compressor_bytes_used": struct.pack("<Q", compressed),
    }
    return lambda name: values[name]


FULL = (8 * GIB - GIB // 8, GIB // 8)
ROOM = (4 * GIB, 4 * GIB)


@pytest.mark.parametrize(
    ("level", "swap", "compressed", "pressure"),
    [
        (1, FULL, 20 * GIB, MemoryPressure.WARN),  # the level has been seen normal with swap full
        (1, ROOM, 20 * GIB, MemoryPressure.NORMAL),
        (1, FULL, 2 * GIB, MemoryPressure.NORMAL),
        (1, (0, 0), 20 * GIB, MemoryPressure.NORMAL),  # no swap was ever needed
        (4, FULL, 20 * GIB, MemoryPressure.CRITICAL),
        (9, ROOM, 0, MemoryPressure.NORMAL),
        (4, None, 0, MemoryPressure.CRITICAL),
        (1, None, 20 * GIB, MemoryPressure.NORMAL),
    ],
)
def test_full_swap_is_a_warning_at_a_normal_level(
    level: int, swap: tuple[int, int] | None, compressed: int, pressure: MemoryPressure
) -> None:
    assert macos_memory.pressure(sysctl(level, compressed), 32 * GIB, swap) is pressure


def test_on_macos_the_machine_is_read_by_psutil_and_sysctl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(psutil, "swap_memory", lambda: SimpleNamespace(used=4 * GIB, free=4 * GIB))
    monkeypatch.setattr(memory, "darwin_sysctl", lambda: sysctl(2, 0))
    found = memory.read()
    assert found.available_bytes > 0
    assert found.pressure is MemoryPressure.WARN


def test_unreadable_swap_is_no_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable() -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(psutil, "swap_memory", unreadable)
    monkeypatch.setattr(memory, "darwin_sysctl", lambda: sysctl(1, 1024 * GIB))
    assert memory.read().pressure is MemoryPressure.NORMAL


LEVEL = struct.pack("<i", 2)


class FakeSysctlByName:
    """The C library's function: knows the pressure level only."""

    argtypes: object = None

    def __call__(self, name: bytes, buffer: ctypes.Array[ctypes.c_char], size, new: None, new_size: int) -> int:
        assert (new, new_size) == (None, 0)
        if name != b"kern.memorystatus_vm_pressure_level":
            return -1
        room = size._obj
        assert room.value >= len(LEVEL)
        ctypes.memmove(buffer, LEVEL, len(LEVEL))
        room.value = len(LEVEL)
        return 0


def test_sysctl_gives_as_many_bytes_as_the_system_wrote(monkeypatch: pytest.MonkeyPatch) -> None:
    class FakeLibc:
        sysctlbyname = FakeSysctlByName()

    monkeypatch.setattr(ctypes, "CDLL", lambda path: FakeLibc)
    read = macos_memory.libc_sysctl()
    assert read("kern.memorystatus_vm_pressure_level") == LEVEL
    assert read("vm.nothing") is None
