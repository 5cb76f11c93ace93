"""How workers really end, what the kernel, the bye and stderr report, and which causes are right."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlx_supervisor.core.diagnosis.causes import Cause
from mlx_supervisor.core.events import Raised

if TYPE_CHECKING:
    from tests.simulation.world.world import World

LOW_SHARE, HIGH_SHARE = 0.75, 0.9
"""Between these shares of the limit either cause is right."""


@dataclass(frozen=True)
class Death:
    """`kind`: the truth, which only the world knows. `errors`: those of the bye, if the worker sends one."""

    kind: str
    exit_code: int | None = None
    signal: int | None = None
    stderr_tail: str = ""
    oom_killed: bool | None = None
    errors: tuple[Raised, ...] = ()


EXITS: dict[str, tuple[int | None, int | None, str]] = {
    "completed": (0, None, ""),
    "stopped": (75, None, ""),
    "refused": (78, None, "refused: no such model\n"),
    "exit_0": (0, None, ""),
    "not_finite": (65, None, "failed: the loss is nan\n"),
    "oom_kill": (None, 9, ""),
    "killed": (None, 9, ""),
}
RAISED = {
    "disk_full": Raised("OSError", "[Errno 28] No space left on device", "train.py", 7, "step"),
    "crash": Raised("KeyError", "'labels'", "train.py", 7, "step"),
    "device_oom": Raised("RuntimeError", "cudaMallocAsync(&data, size, stream) failed: out of memory", "train.py", 7),
    "resource_limit": Raised("RuntimeError", "[metal::malloc] Resource limit (499000) exceeded.", "train.py", 7),
    "gpu_watchdog": Raised(
        "RuntimeError",
        "[METAL] Command buffer execution failed: Impacting Interactivity "
        "(0000000e:kIOGPUCommandBufferCallbackErrorImpactingInteractivity)",
    ),
    "gpu_error": Raised("RuntimeError", "CUDA error: an illegal memory access was encountered", "train.py", 7),
    "out_of_memory": Raised("MemoryError", "", "train.py", 7, "step"),
}
"""What ends a worker with exit code 1: sent in its bye, which can be lost, and printed."""


def death_of(kind: str, world: World) -> Death:
    """As the supervisor will see it. Where the kernel counts its own kills, it reports whether it was one."""
    counted = kind == "oom_kill" if world.kernel_tells else None
    if kind in RAISED:
        error = RAISED[kind]
        return Death(kind, 1, None, _traceback(error), counted, (error,))
    return Death(kind, *EXITS[kind], counted)


def _traceback(error: Raised) -> str:
    last = f"{error.kind}: {error.message}" if error.message else error.kind
    if not error.file:
        return f"{last}\n"
    where = f", in {error.function}" if error.function else ""
    return f'Traceback (most recent call last):\n  File "{error.file}", line {error.line}{where}\n{last}\n'


_MEMORY = {"PRESSURE", "LEAK", "OOM_KILL"}
NAMES: dict[str, set[str]] = {
    "completed": {"COMPLETED", "CRASH"},  # every message about the last step may have been lost
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
"""Names of `Cause` that are right for a death that the supervisor did not bring about, by the truth."""


def right_causes(death: Death, limit_share: float) -> set[Cause]:
    """Without the kernel's count, a SIGKILL from outside is attributed to memory if the last footprint was high.

    `limit_share`: the last footprint that was reported, over the limit.
    """
    names = set(NAMES[death.kind])
    if death.signal == 9 and death.oom_killed is None:
        high, low = limit_share > HIGH_SHARE, limit_share < LOW_SHARE
        names = {"KILLED"} if low else _MEMORY if high else _MEMORY | {"KILLED"}
    return {cause for cause in Cause if cause.name in names}
