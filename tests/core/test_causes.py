"""Why a worker died, from its exit and its last words."""

import pytest

from mlx_supervisor.core.causes import Cause, cause_of_exit, last_line

METAL_OOM = """Iter 10: train loss 2.1
libc++abi: terminating due to uncaught exception of type std::runtime_error: [METAL] Command buffer execution failed:
Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)
"""
WATCHDOG = "[METAL] Command buffer execution failed: Impacting Interactivity (0000000e:%s)"


@pytest.mark.parametrize(
    ("exit_code", "signal", "stderr", "oom_killed", "near_limit", "cause"),
    [
        (None, 9, "", True, False, Cause.OOM_KILL),
        (None, 9, "", False, True, Cause.KILLED),
        (None, 9, "", None, True, Cause.PRESSURE),
        (None, 9, "", None, False, Cause.KILLED),
        (None, 9, METAL_OOM, False, False, Cause.KILLED),
        (None, 15, "", None, True, Cause.INTERRUPTED),
        (None, 2, "KeyboardInterrupt", None, False, Cause.INTERRUPTED),
        (None, None, "", None, False, Cause.KILLED),
        (None, 6, METAL_OOM, None, False, Cause.DEVICE_OOM),
        (134, None, METAL_OOM, None, False, Cause.DEVICE_OOM),
        (1, None, "RuntimeError: cudaMallocAsync(&data, size, stream) failed: out of memory", None, False,
         Cause.DEVICE_OOM),
        (1, None, "[metal::malloc] Resource limit (499000) exceeded.", None, False, Cause.RESOURCE_LIMIT),
        (1, None, "[metal::malloc] Attempting to allocate 99 bytes", None, False, Cause.DEVICE_OOM),
        (1, None, WATCHDOG % "kIOGPUCommandBufferCallbackErrorImpactingInteractivity", None, True, Cause.GPU_WATCHDOG),
        (1, None, "MemoryError", None, False, Cause.DEVICE_OOM),
        (1, None, "ValueError: bad", True, True, Cause.CRASH),
        (None, 11, "", None, False, Cause.CRASH),
    ],
)  # fmt: skip
def test_cause(
    exit_code: int | None, signal: int | None, stderr: str, oom_killed: bool | None, near_limit: bool, cause: Cause
) -> None:
    assert cause_of_exit(exit_code, signal, stderr, oom_killed=oom_killed, near_limit=near_limit) is cause


def test_last_line() -> None:
    assert last_line("") == last_line(" \n\n\t\n") == ""
    assert last_line("Traceback\n  ValueError: bad  \n\n") == "ValueError: bad"
    assert len(last_line("x" * 100_000)) == 300
