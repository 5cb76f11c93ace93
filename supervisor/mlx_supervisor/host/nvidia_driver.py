"""NVIDIA's driver: the memory of a device, and how much of it each process holds, through NVML.

The package nvidia-ml-py (the extra `nvidia`) is imported only once a worker has named a device with its own memory.
"""

import contextlib
import importlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

INSTALL = "install nvidia-ml-py (the extra `nvidia`)"


class DriverError(Exception):
    """The driver can't be read; the text says why."""


@dataclass(frozen=True, slots=True)
class DeviceReading:
    """`by_pid`: bytes of each process with memory on the device; None: the driver does not know the amount."""

    total_bytes: int
    free_bytes: int
    by_pid: Mapping[int, int | None]

    def used_by(self, group: frozenset[int]) -> int | None:
        """Bytes that a worker's process group holds; None if the driver can't tell.

        A driver outside this process's namespace (some containers) reports other numbers for the processes. If it
        reports only one process, and no process here has its number, that is the worker.
        """
        pids = [pid for pid in self.by_pid if pid in group]
        if not pids:
            pids = list(self.by_pid)
            if len(pids) != 1 or _exists(pids[0]):
                return None
        amounts = [self.by_pid[pid] for pid in pids]
        return None if None in amounts else sum(each or 0 for each in amounts)


class Driver:
    """`library`: the module pynvml, initialized; or one with the same functions."""

    def __init__(self, library: Any) -> None:
        self._library = library
        self._handles: dict[str, Any] = {}

    def read(self, uuid: str) -> DeviceReading:
        """The device with this UUID; "": the first one. Takes about a millisecond. Raises DriverError."""
        library = self._library
        try:
            if uuid not in self._handles:
                self._handles[uuid] = (
                    library.nvmlDeviceGetHandleByUUID(uuid) if uuid else library.nvmlDeviceGetHandleByIndex(0)
                )
            handle = self._handles[uuid]
            memory = self._memory(handle)
            processes = [*library.nvmlDeviceGetComputeRunningProcesses(handle)]
            with contextlib.suppress(Exception):  # not every device draws
                processes += library.nvmlDeviceGetGraphicsRunningProcesses(handle)
        except Exception as error:  # NVML's errors are classes of its own
            raise DriverError(f"{type(error).__name__}: {error}"[:200]) from error
        by_pid = {int(each.pid): _amount(each.usedGpuMemory) for each in processes}
        return DeviceReading(int(memory.total), int(memory.free), by_pid)

    def _memory(self, handle: Any) -> Any:
        library = self._library
        version = getattr(library, "nvmlMemory_v2", None)
        if version is not None:
            with contextlib.suppress(Exception):  # an older driver
                return library.nvmlDeviceGetMemoryInfo(handle, version)
        return library.nvmlDeviceGetMemoryInfo(handle)


def open_driver() -> Driver:
    """The driver of this machine. Raises DriverError."""
    try:
        library = importlib.import_module("pynvml")
    except ImportError:
        raise DriverError(f"the package is missing: {INSTALL}") from None
    try:
        library.nvmlInit()
    except Exception as error:
        raise DriverError(f"{type(error).__name__}: {error}"[:200]) from error
    return Driver(library)


def _amount(value: Any) -> int | None:
    return None if value is None else int(value)


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True
