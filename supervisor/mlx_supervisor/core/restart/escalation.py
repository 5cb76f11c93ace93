"""What a death changes about the next life: the rungs from half the batch to gradient checkpointing.

Caches are cleared before it comes to this (`core/machine/running.py`). docs/ladder.md is the same for readers.
"""

from dataclasses import dataclass

from mlx_supervisor.core.diagnosis.causes import MEMORY_CAUSES, Cause
from mlx_supervisor.core.history import RunHistory
from mlx_supervisor.core.policy import RunPolicy
from mlx_supervisor.core.restart.batch import BatchPlan

SAME_BATCH = {
    Cause.RESOURCE_LIMIT: "the batch stays, for this limit counts buffers and not bytes",
    Cause.GPU_WATCHDOG: "the batch stays, for a smaller one would not help",
}


@dataclass(frozen=True, slots=True)
class Rung:
    """What is done about a death. `text`: part of a sentence, or "".

    `eased`: the next life needs less memory than any since the last progress. A batch that grows back and is halved
    again eases nothing: that can go on for ever.
    """

    eased: bool
    text: str


def checkpoints_gradients(policy: RunPolicy, history: RunHistory) -> bool:
    """Whether the next life is to compute activations again instead of keeping them."""
    wanted = policy.memory.gradient_checkpointing
    return wanted == "always" or (wanted == "last_resort" and history.gradient_checkpointing)


def climb(policy: RunPolicy, batch: BatchPlan, history: RunHistory, cause: Cause, *, progress: bool) -> Rung:
    """Take the next rung that helps against `cause`, in `batch` and `history`.

    A restart cures a leak, so it halves the batch once and then no more, for as long as each life makes progress.
    """
    if progress:
        history.least_size = None
    if cause not in MEMORY_CAUSES:
        return Rung(False, SAME_BATCH.get(cause, ""))
    size, leak = batch.size, cause is Cause.LEAK
    if leak and progress and batch.reduced_for_leak:
        return Rung(
            False, f"restarts cure a leak, so the batch stays at {size} after one halving (batch.halve_on_leak)"
        )
    if (not leak or policy.batch.halve_on_leak) and batch.halve(for_pressure=not leak):
        text = f"the batch goes from {size} to {batch.size} (batch.minimum is {batch.minimum})"
        return Rung(_is_least(batch.size, history), text)
    if leak and progress:
        key = f"batch.minimum is {batch.minimum}" if policy.batch.halve_on_leak else "batch.halve_on_leak is off"
        return Rung(False, f"restarts cure a leak, so the batch stays at {size} ({key})")
    return _last_resort(policy, batch, history)


def _is_least(size: int | None, history: RunHistory) -> bool:
    if size is None or (history.least_size is not None and size >= history.least_size):
        return False
    history.least_size = size
    return True


def _last_resort(policy: RunPolicy, batch: BatchPlan, history: RunHistory) -> Rung:
    stays = f"the batch stays at {batch.size} (batch.minimum is {batch.minimum})" if batch.size else "the batch stays"
    if checkpoints_gradients(policy, history):
        return Rung(False, f"{stays}, and gradient checkpointing is on already")
    if policy.memory.gradient_checkpointing != "last_resort":
        return Rung(False, f"{stays}, and memory.gradient_checkpointing is {policy.memory.gradient_checkpointing!r}")
    if not history.can_checkpoint_gradients:
        return Rung(False, stays)
    history.gradient_checkpointing = True
    return Rung(True, f"{stays}, so gradient checkpointing is turned on (memory.gradient_checkpointing)")
