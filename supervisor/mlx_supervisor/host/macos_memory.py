"""Memory pressure on macOS, from sysctl. Written from the documented layouts; see docs/memory.md."""

from collections.abc import Callable
from typing import TypeVar

from mlx_supervisor.core.events import MemoryPressure

PRESSURE_LEVEL = "kern.memorystatus_vm_pressure_level"
COMPRESSOR_BYTES = "vm.compressor_bytes_used"
LEVELS = {1: MemoryPressure.NORMAL, 2: MemoryPressure.WARN, 4: MemoryPressure.CRITICAL}
SWAP_LEFT_SHARE = 0.05
COMPRESSED_SHARE = 0.5
"""The level has been seen normal with swap full. So less than the first share of swap free, with more than the second
of memory held by the compressor, counts as a warning. Both were chosen without a measurement."""
VALUE_LIMIT_BYTES = 256

Sysctl = Callable[[str], bytes | None]
"""Returns the value of a name, or None."""
T = TypeVar("T")


def parse_pressure_level(value: bytes) -> MemoryPressure:
    """A 32-bit number: 1 normal, 2 warning, 4 critical. Raises ValueError for anything else."""
    level = _number(value)
    if level not in LEVELS:
        raise ValueError(f"{PRESSURE_LEVEL}: found {level}; allowed: {sorted(LEVELS)}")
    return LEVELS[level]


def pressure(sysctl: Sysctl, total_bytes: int, swap: tuple[int, int] | None) -> MemoryPressure:
    """The system's level, or a warning where that is normal despite full swap (`SWAP_LEFT_SHARE`).

    `swap`: used and free bytes, if known.
    """
    level = _read(sysctl, PRESSURE_LEVEL, parse_pressure_level) or MemoryPressure.NORMAL
    compressed = _read(sysctl, COMPRESSOR_BYTES, _number)
    if level is not MemoryPressure.NORMAL or swap is None or compressed is None:
        return level
    used, free = swap
    full = free < SWAP_LEFT_SHARE * (used + free)
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
        raise ValueError(f"found {len(value)} bytes; allowed: 4 or 8")
    return int.from_bytes(value, "little")


def _read(sysctl: Sysctl, name: str, parse: Callable[[bytes], T]) -> T | None:
    value = sysctl(name)
    try:
        return None if value is None else parse(value)
    except ValueError:
        return None
