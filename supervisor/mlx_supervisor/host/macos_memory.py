"""What macOS tells of the machine's memory, by sysctl. Written from the documented layouts; see docs/memory.md."""

import struct
from collections.abc import Callable
from typing import NamedTuple, TypeVar

from mlx_supervisor.core.events import MemoryPressure

PRESSURE_LEVEL = "kern.memorystatus_vm_pressure_level"
SWAP_USAGE = "vm.swapusage"
COMPRESSOR_BYTES = "vm.compressor_bytes_used"
LEVELS = {1: MemoryPressure.NORMAL, 2: MemoryPressure.WARN, 4: MemoryPressure.CRITICAL}
XSW_USAGE = struct.Struct("<3Q2I")
"""`struct xsw_usage` of sys/sysctl.h: total, available and used bytes of swap, a page's size, whether encrypted."""
SWAP_LEFT_SHARE = 0.05
COMPRESSED_SHARE = 0.5
"""The level has read normal with swap full. Less than the one share of swap left, and more than the other of memory
held by the compressor, is a warning whatever the level says. Both are our own choice."""
VALUE_LIMIT_BYTES = 256

Sysctl = Callable[[str], bytes | None]
"""The value of a name; None: there is none."""
T = TypeVar("T")


class Swap(NamedTuple):
    """In bytes."""

    total: int
    available: int
    used: int


def parse_pressure_level(value: bytes) -> MemoryPressure:
    """A 32-bit number: 1 normal, 2 warning, 4 critical. Raises ValueError on anything else."""
    level = _number(value)
    if level not in LEVELS:
        raise ValueError(f"{PRESSURE_LEVEL}: found {level}, allowed are {sorted(LEVELS)}")
    return LEVELS[level]


def parse_swap_usage(value: bytes) -> Swap:
    """A `struct xsw_usage`. Raises ValueError on one of another length."""
    if len(value) != XSW_USAGE.size:
        raise ValueError(f"{SWAP_USAGE} has {XSW_USAGE.size} bytes, found {len(value)}")
    total, available, used, _, _ = XSW_USAGE.unpack(value)
    return Swap(total, available, used)


def swap_used_bytes(sysctl: Sysctl) -> int | None:
    """None where it can't be told."""
    swap = _read(sysctl, SWAP_USAGE, parse_swap_usage)
    return None if swap is None else swap.used


def pressure(sysctl: Sysctl, total_bytes: int) -> MemoryPressure:
    """The system's level, or a warning of our own where that says nothing yet (`SWAP_LEFT_SHARE`)."""
    level = _read(sysctl, PRESSURE_LEVEL, parse_pressure_level) or MemoryPressure.NORMAL
    swap = _read(sysctl, SWAP_USAGE, parse_swap_usage)
    compressed = _read(sysctl, COMPRESSOR_BYTES, _number)
    if level is not MemoryPressure.NORMAL or swap is None or compressed is None:
        return level
    full = swap.available < SWAP_LEFT_SHARE * swap.total
    return MemoryPressure.WARN if full and compressed > COMPRESSED_SHARE * total_bytes else level


def libc_sysctl() -> Sysctl:
    """sysctlbyname(3). Raises OSError without a C library."""
    import ctypes

    libc = ctypes.CDLL(None)
    libc.sysctlbyname.argtypes = [
        ctypes.c_char_p,
        ctypes.c_void_p,
        ctypes.POINTER(ctypes.c_size_t),
        ctypes.c_void_p,
        ctypes.c_size_t,
    ]

    def sysctl(name: str) -> bytes | None:
        buffer = ctypes.create_string_buffer(VALUE_LIMIT_BYTES)
        size = ctypes.c_size_t(VALUE_LIMIT_BYTES)
        if libc.sysctlbyname(name.encode(), buffer, ctypes.byref(size), None, 0) != 0:
            return None
        return buffer.raw[: size.value]

    return sysctl


def _number(value: bytes) -> int:
    if len(value) not in (4, 8):
        raise ValueError(f"4 or 8 bytes were expected, found {len(value)}")
    return int.from_bytes(value, "little")


def _read(sysctl: Sysctl, name: str, parse: Callable[[bytes], T]) -> T | None:
    value = sysctl(name)
    try:
        return None if value is None else parse(value)
    except ValueError:
        return None
