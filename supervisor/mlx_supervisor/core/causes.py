"""Why a worker died, named before anything is decided from it."""

from dataclasses import dataclass
from enum import StrEnum


class Cause(StrEnum):
    """Only the memory causes halve the batch."""

    COMPLETED = "completed"
    ASKED = "asked for"
    PRESSURE = "memory pressure"
    LEAK = "memory leak"
    OOM_KILL = "killed by the kernel for memory"
    DEVICE_OOM = "device out of memory"
    OUT_OF_MEMORY = "out of memory"
    RESOURCE_LIMIT = "Metal resource limit"
    GPU_WATCHDOG = "GPU watchdog"
    GPU_ERROR = "GPU error"
    NOT_FINITE = "the loss is not a finite number"
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


MEMORY_CAUSES = frozenset({Cause.PRESSURE, Cause.LEAK, Cause.OOM_KILL, Cause.DEVICE_OOM, Cause.OUT_OF_MEMORY})

EXIT_NOT_FINITE_CODE = 65
"""`wire.EXIT_NOT_FINITE`, which the core may not import; a test holds them equal."""

SIGKILL = 9
POLITE_SIGNALS = frozenset({1, 2, 15})
"""SIGHUP, SIGINT, SIGTERM: somebody asked for the end, before the worker could answer in its own way."""

@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Why a worker died, for people and for what is decided from it.

    `text`: a sentence, or the last lines of the traceback; at most 300 characters. `advice`: what helps, "" if nothing
    is known. `error_key`: equal in two lives that died of the same error of the user's code; "" for other causes.
    """

    cause: Cause
    text: str
    advice: str = ""
    error_key: str = ""

    @property
    def memory(self) -> bool:
        """Whether less memory would have helped."""
        return self.cause in MEMORY_CAUSES


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


def diagnose(
    exit_code: int | None,
    signal: int | None,
    stderr_tail: str,
    *,
    oom_killed: bool | None,
    near_limit: bool,
    bye_reason: str = "",
    jetsam: bool | None = None,
) -> Diagnosis:
    """What ended a life that nobody here ended, from the exit and the last words.

    `oom_killed`, `jetsam`: whether the kernel says that it killed for memory; None where it can't tell. `near_limit`:
    whether the last sample stood near the limit. `bye_reason`: what the worker's last message said.
    """
    said = bye_reason or last_line(stderr_tail)
    if exit_code == EXIT_NOT_FINITE_CODE:
        return Diagnosis(Cause.NOT_FINITE, said)
    killed = jetsam or oom_killed
    cause = cause_of_exit(exit_code, signal, stderr_tail, oom_killed=killed, near_limit=near_limit)
    return Diagnosis(cause, said, "", said if cause is Cause.CRASH else "")


def last_line(text: str, limit_chars: int = 300) -> str:
    """The last line of `text` that says something, shortened."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:limit_chars] if lines else ""
