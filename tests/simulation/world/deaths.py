"""How workers end in truth, what the kernel and stderr tell of it, and which causes may be named for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlx_supervisor.core.diagnosis.causes import Cause

if TYPE_CHECKING:
    from tests.simulation.world.world import World

LOW_SHARE, HIGH_SHARE = 0.75, 0.9
"""Between these shares of the limit either is right."""
TRACEBACK = 'Traceback (most recent call last):\n  File "train.py", line 7, in step\n    batch["labels"]\n'


@dataclass(frozen=True)
class Death:
    """`kind`: the truth, which only the world knows."""

    kind: str
    exit_code: int | None = None
    signal: int | None = None
    stderr_tail: str = ""
    oom_killed: bool | None = None


EXITS: dict[str, tuple[int | None, int | None, str]] = {
    "completed": (0, None, ""),
    "stopped": (75, None, ""),
    "refused": (78, None, "refused: no such model\n"),
    "exit_0": (0, None, ""),
    "disk_full": (1, None, TRACEBACK + "OSError: [Errno 28] No space left on device\n"),
    "crash": (1, None, TRACEBACK + "KeyError: 'labels'\n"),
    "not_finite": (65, None, "the loss is nan\n"),
    "device_oom": (1, None, TRACEBACK + "RuntimeError: cudaMallocAsync(&data, size, stream) failed: out of memory\n"),
    "resource_limit": (1, None, TRACEBACK + "RuntimeError: [metal::malloc] Resource limit (499000) exceeded.\n"),
    "gpu_watchdog": (
        1,
        None,
        "RuntimeError: [METAL] Command buffer execution failed: Impacting Interactivity "
        "(0000000e:kIOGPUCommandBufferCallbackErrorImpactingInteractivity)\n",
    ),
    "gpu_error": (1, None, TRACEBACK + "RuntimeError: CUDA error: an illegal memory access was encountered\n"),
    "out_of_memory": (1, None, TRACEBACK + "MemoryError\n"),
    "oom_kill": (None, 9, ""),
    "killed": (None, 9, ""),
}


def death_of(kind: str, world: World) -> Death:
    """As the supervisor will see it. Where the kernel counts its own kills, it says whether it was one."""
    code, signal, tail = EXITS[kind]
    told = kind == "oom_kill" if world.kernel_tells else None
    return Death(kind, code, signal, tail, told)


_MEMORY = {"PRESSURE", "LEAK", "OOM_KILL"}
NAMES: dict[str, set[str]] = {
    "completed": {"COMPLETED", "CRASH"},  # all that told of the last step may have been lost
    "stopped": {"INTERRUPTED"},
    "interrupted": {"INTERRUPTED"},
    "refused": {"REFUSED"},
    "exit_0": {"CRASH", "USER_ERROR", "COMPLETED"},
    "disk_full": {"CRASH", "USER_ERROR", "DISK_FULL"},
    "crash": {"CRASH", "USER_ERROR"},
    "not_finite": {"NOT_FINITE", "NAN", "NAN_LOSS"},
    "device_oom": {"DEVICE_OOM"},
    "resource_limit": {"RESOURCE_LIMIT"},
    "gpu_watchdog": {"GPU_WATCHDOG"},
    "gpu_error": {"GPU_ERROR"},
    "out_of_memory": {"OUT_OF_MEMORY"},
    "oom_kill": {"OOM_KILL"},
    "killed": {"KILLED"},
    "ordered": set(),
}
"""Names of `Cause` that are right for a death that nobody here ordered, by the truth."""


def right_causes(death: Death, limit_share: float) -> set[Cause]:
    """A SIGKILL by nobody known is put down to memory where the last footprint stood high, if the kernel doesn't tell.

    `limit_share`: the last footprint that was heard of, over the limit.
    """
    names = set(NAMES[death.kind])
    if death.signal == 9 and death.oom_killed is None:
        high, low = limit_share > HIGH_SHARE, limit_share < LOW_SHARE
        names = {"KILLED"} if low else _MEMORY if high else _MEMORY | {"KILLED"}
    return {cause for cause in Cause if cause.name in names}
