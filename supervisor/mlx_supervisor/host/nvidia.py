"""What an NVIDIA driver charges a process for on its GPUs. Needs the extra `nvidia`; without it, everything is None.

Nothing here raises, and nothing is imported before somebody asks: a daemon that does not ask pays nothing.
"""

from collections.abc import Collection
from functools import cache
from typing import Any


def used_bytes(pids: Collection[int]) -> int | None:
    """Memory in bytes that these processes hold on all GPUs together; 0 when they are on none.

    None: no driver, no `nvidia-ml-py`, or the driver doesn't tell (as under Windows' driver model, or in a container
    whose processes the driver knows by other numbers).
    """
    nvml = _nvml()
    if nvml is None:
        return None
    try:
        per_process = [each for device in _devices(nvml) for each in nvml.nvmlDeviceGetComputeRunningProcesses(device)]
    except Exception:  # NVMLError, or whatever a driver of another version makes of the call
        return None
    ours: list[object] = [each.usedGpuMemory for each in per_process if each.pid in pids]
    sizes = [size for size in ours if isinstance(size, int) and size >= 0]
    return sum(sizes) if len(sizes) == len(ours) else None


def device_bytes() -> list[tuple[int, int]] | None:
    """Used and all bytes of each GPU, by whomever they are used; None as above."""
    nvml = _nvml()
    if nvml is None:
        return None
    try:
        infos = [nvml.nvmlDeviceGetMemoryInfo(device) for device in _devices(nvml)]
        return [(int(info.used), int(info.total)) for info in infos]
    except Exception:
        return None


def _devices(nvml: Any) -> list[Any]:
    return [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]


@cache
def _nvml() -> Any:
    """The library, ready; None for good when it can't be had."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:
        return None
    return pynvml
