"""Why a worker died, named before anything is decided from it."""

from enum import StrEnum


class Cause(StrEnum):
    """Only the memory causes halve the batch."""

    COMPLETED = "completed"
    ASKED = "asked for"
    PRESSURE = "memory pressure"
    LEAK = "memory leak"
    OOM_KILL = "killed by the kernel for memory"
    DEVICE_OOM = "device out of memory"
    RESOURCE_LIMIT = "Metal resource limit"
    GPU_WATCHDOG = "GPU watchdog"
    HANG = "hang"
    START_TIMEOUT = "not ready in time"
    CRASH = "crash"
    KILLED = "killed by somebody else"
    INTERRUPTED = "told to stop by somebody else"
    REFUSED = "refused its job"
    SPAWN_FAILED = "could not be started"
    BLIND = "memory could not be measured"
    SUPERVISOR_LOST = "the supervisor died"
    HOST_LOST = "the machine restarted"


MEMORY_CAUSES = frozenset({Cause.PRESSURE, Cause.LEAK, Cause.OOM_KILL, Cause.DEVICE_OOM})

SIGKILL = 9
POLITE_SIGNALS = frozenset({1, 2, 15})
"""SIGHUP, SIGINT, SIGTERM: somebody asked for the end, before the worker could answer in its own way."""

STDERR_MARKS = (
    ("kIOGPUCommandBufferCallbackErrorOutOfMemory", Cause.DEVICE_OOM),
    ("cudaMallocAsync(&data, size, stream) failed: out of memory", Cause.DEVICE_OOM),
    ("CUDA_ERROR_OUT_OF_MEMORY", Cause.DEVICE_OOM),
    ("[metal::malloc] Resource limit", Cause.RESOURCE_LIMIT),
    ("[metal::malloc] Attempting to allocate", Cause.DEVICE_OOM),
    ("[malloc] Unable to allocate", Cause.DEVICE_OOM),
    ("kIOGPUCommandBufferCallbackErrorImpactingInteractivity", Cause.GPU_WATCHDOG),
    ("kIOGPUCommandBufferCallbackErrorTimeout", Cause.GPU_WATCHDOG),
    ("MemoryError", Cause.DEVICE_OOM),
)
"""What MLX and the drivers write before they die, and what it means."""


def cause_of_exit(
    exit_code: int | None, signal: int | None, stderr_tail: str, *, oom_killed: bool | None, near_limit: bool
) -> Cause:
    """The cause of a death that nobody here ordered.

    `oom_killed`: whether the kernel counted an out-of-memory kill meanwhile; None where it can't tell.
    `near_limit`: whether the last sample stood near the limit, which decides when the kernel can't tell.
    """
    if signal == SIGKILL:
        if oom_killed:
            return Cause.OOM_KILL
        return Cause.PRESSURE if oom_killed is None and near_limit else Cause.KILLED
    if signal in POLITE_SIGNALS:
        return Cause.INTERRUPTED
    if exit_code is None and signal is None:
        return Cause.KILLED
    for mark, cause in STDERR_MARKS:
        if mark in stderr_tail:
            return cause
    return Cause.CRASH


def last_line(text: str, limit_chars: int = 300) -> str:
    """The last line of `text` that says something, shortened."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:limit_chars] if lines else ""
