"""The machine's memory: total, available, and pressure.

The limit of this process's control group counts as the machine's: beyond it, the kernel kills.
"""

import re
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import psutil

from mlx_supervisor.core.events import MemoryPressure
from mlx_supervisor.host import cgroup

WARN_SOME_PERCENT = 10.0
"""Time in which some task stalled on memory, of the last 10 s: systemd warns its services from 200 ms in 2 s on
(`DefaultMemoryPressureThresholdSec=`, systemd-system.conf(5))."""
CRITICAL_FULL_PERCENT = 60.0
"""Time in which all tasks stalled: from here on systemd-oomd kills (`DefaultMemoryPressureLimit=`, oomd.conf(5))."""
_PRESSURE = re.compile(r"^(some|full) avg10=([0-9]+(?:\.[0-9]+)?) ", re.MULTILINE)


class MachineMemory(NamedTuple):
    """`available_bytes`: without swapping, and within the control group."""

    available_bytes: int
    pressure: MemoryPressure


def read(root: Path = cgroup.ROOT) -> MachineMemory:
    """Read the machine's memory. Takes some tenths of a millisecond."""
    available = int(psutil.virtual_memory().available)
    group = cgroup.find(root=root)
    left = None if group is None else group.available_bytes()
    available = available if left is None else min(available, left)
    return MachineMemory(available, _linux_pressure(root) if sys.platform == "linux" else _darwin_pressure())


def machine_bytes(root: Path = cgroup.ROOT) -> int:
    """The machine's memory, or the control group's limit if that is less."""
    total = int(psutil.virtual_memory().total)
    group = cgroup.find(root=root)
    limit = None if group is None else group.limit_bytes()
    return total if limit is None else min(total, limit)


def parse_pressure(text: str) -> MemoryPressure:
    """/proc/pressure/memory, in the format of the kernel's Documentation/accounting/psi.rst; NORMAL when malformed."""
    percent = {kind: float(value) for kind, value in _PRESSURE.findall(text)}
    if percent.get("full", 0.0) >= CRITICAL_FULL_PERCENT:
        return MemoryPressure.CRITICAL
    return MemoryPressure.WARN if percent.get("some", 0.0) >= WARN_SOME_PERCENT else MemoryPressure.NORMAL


def _swap() -> tuple[int, int] | None:
    """Used and free bytes."""
    try:
        swap = psutil.swap_memory()
    except (OSError, psutil.Error):
        return None
    return int(swap.used), int(swap.free)


@cache
def darwin_sysctl() -> Callable[[str], bytes | None]:
    """The reader of `macos_memory`, which is not imported on Linux, to save memory."""
    from mlx_supervisor.host import macos_memory

    return macos_memory.libc_sysctl()


def _linux_pressure(root: Path) -> MemoryPressure:
    try:
        return parse_pressure((root / "proc" / "pressure" / "memory").read_text(errors="replace"))
    except OSError:  # not every kernel has it, or lets users read it
        return MemoryPressure.NORMAL


def _darwin_pressure() -> MemoryPressure:
    from mlx_supervisor.host import macos_memory

    return macos_memory.pressure(darwin_sysctl(), machine_bytes(), _swap())
