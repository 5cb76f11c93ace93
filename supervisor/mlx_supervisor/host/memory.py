"""The machine's memory: how much there is, how much it can still give, swap in use, and pressure.

A limit of the control group that we live in counts as the machine's: past it, the kernel kills.
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
"""Time in which some task stood still for want of memory, of the last 10 s: systemd warns its services from 200 ms in
2 s on (`DefaultMemoryPressureThresholdSec=`, systemd-system.conf(5))."""
CRITICAL_FULL_PERCENT = 60.0
"""Time in which every task did: from here on systemd-oomd kills (`DefaultMemoryPressureLimit=`, oomd.conf(5))."""
_PRESSURE = re.compile(r"^(some|full) avg10=([0-9]+(?:\.[0-9]+)?) ", re.MULTILINE)


class MachineMemory(NamedTuple):
    """`available_bytes`: without swapping, and within our control group. `swap_used_bytes`: None: can't be told."""

    available_bytes: int
    swap_used_bytes: int | None
    pressure: MemoryPressure


def read(root: Path = cgroup.ROOT) -> MachineMemory:
    """The machine now. Costs some tenths of a millisecond: for once a second."""
    memory = _meminfo(root)
    available = memory.get("MemAvailable")
    if available is None:
        available = int(psutil.virtual_memory().available)
    group = cgroup.find(root=root)
    left = None if group is None else group.available_bytes()
    swap_used, pressure = _linux(memory, root) if sys.platform == "linux" else _darwin()
    return MachineMemory(available if left is None else min(available, left), swap_used, pressure)


def machine_bytes(root: Path = cgroup.ROOT) -> int:
    """The machine's memory, or the limit of our control group where that is less."""
    total = _meminfo(root).get("MemTotal") or int(psutil.virtual_memory().total)
    group = cgroup.find(root=root)
    limit = None if group is None else group.limit_bytes()
    return total if limit is None else min(total, limit)


def parse_meminfo(text: str) -> dict[str, int]:
    """/proc/meminfo in bytes; lines that are not an amount in kB are left out."""
    found = {}
    for line in text.splitlines():
        fields = line.split()
        if len(fields) == 3 and fields[2] == "kB" and fields[1].isdigit():
            found[fields[0].rstrip(":")] = int(fields[1]) * 1024
    return found


def parse_pressure(text: str) -> MemoryPressure:
    """/proc/pressure/memory, as the kernel's Documentation/accounting/psi.rst has it; NORMAL when it says nothing."""
    percent = {"some": 0.0, "full": 0.0}
    for kind, value in _PRESSURE.findall(text):
        percent[kind] = float(value)
    if percent["full"] >= CRITICAL_FULL_PERCENT:
        return MemoryPressure.CRITICAL
    return MemoryPressure.WARN if percent["some"] >= WARN_SOME_PERCENT else MemoryPressure.NORMAL


def _meminfo(root: Path) -> dict[str, int]:
    return parse_meminfo(_text(root / "proc" / "meminfo")) if sys.platform == "linux" else {}


def _linux(memory: dict[str, int], root: Path) -> tuple[int | None, MemoryPressure]:
    total, free = memory.get("SwapTotal"), memory.get("SwapFree")
    used = None if total is None or free is None else total - free
    return used, parse_pressure(_text(root / "proc" / "pressure" / "memory"))


def _darwin() -> tuple[int | None, MemoryPressure]:
    from mlx_supervisor.host import macos_memory

    sysctl = _sysctl()
    return macos_memory.swap_used_bytes(sysctl), macos_memory.pressure(sysctl, machine_bytes())


@cache
def _sysctl() -> Callable[[str], bytes | None]:
    from mlx_supervisor.host import macos_memory  # here, so that Linux does not pay for it

    return macos_memory.libc_sysctl()


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:  # kernels without it, or that keep it to themselves
        return ""
