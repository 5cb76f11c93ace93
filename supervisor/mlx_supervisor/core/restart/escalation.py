"""The escalation ladder: what a death changes for the next generation, from half the batch to gradient checkpointing.

Clearing the caches comes first (`core/machine/running.py`). docs/ladder.md describes the ladder for users.
"""

from dataclasses import dataclass

from mlx_supervisor.core.diagnosis.causes import MEMORY_CAUSES, Cause
from mlx_supervisor.core.history import RunHistory
from mlx_supervisor.core.policy import RunPolicy
from mlx_supervisor.core.restart.batch import BatchPlan

SAME_BATCH = {
    Cause.RESOURCE_LIMIT: "micro-batch kept (this limit counts buffers, not bytes)",
    Cause.GPU_WATCHDOG: "micro-batch kept (a smaller one would not help)",
}


@dataclass(frozen=True, slots=True)
class Rung:
    """The response to a death. `text`: what and why, "" if nothing changes. `end`: why the next rung may be the last.

    `eased`: the next generation needs less memory than any since the last progress. A batch that grows back and is
    halved again does not count, as that can repeat forever.
    """

    eased: bool
    text: str
    end: str = ""


CROWDED = Rung(False, "micro-batch kept (other processes hold the device's memory)")


def checkpoints_gradients(policy: RunPolicy, history: RunHistory) -> bool:
    """Whether the next generation recomputes activations instead of keeping them."""
    setting = policy.memory.gradient_checkpointing
    return setting == "always" or (setting == "last_resort" and history.gradient_checkpointing)


def climb(policy: RunPolicy, batch: BatchPlan, history: RunHistory, cause: Cause, *, progress: bool) -> Rung:
    """Take the next rung that helps against `cause`; changes `batch` and `history`.

    A restart cures a leak, so a leak halves the batch only once while every generation makes progress.
    """
    if progress:
        history.least_size = None
    if cause not in MEMORY_CAUSES:
        return Rung(False, SAME_BATCH.get(cause, ""))
    size, leak = batch.size, cause is Cause.LEAK
    kept = f"micro-batch kept at {size}: a restart cures the leak"
    if leak and progress and batch.reduced_for_leak:
        return Rung(False, f"{kept}, one halving is enough (batch.halve_on_leak)")
    if (not leak or policy.batch.halve_on_leak) and batch.halve(for_pressure=not leak):
        text = f"micro-batch halved, {size} → {batch.size} (batch.minimum = {batch.minimum})"
        return Rung(_is_least(batch.size, history), text)
    if leak and progress:
        key = f"batch.minimum = {batch.minimum}" if policy.batch.halve_on_leak else "batch.halve_on_leak is off"
        return Rung(False, f"{kept} ({key})")
    return _last_resort(policy, batch, history)


def _is_least(size: int | None, history: RunHistory) -> bool:
    if size is None or (history.least_size is not None and size >= history.least_size):
        return False
    history.least_size = size
    return True


def _last_resort(policy: RunPolicy, batch: BatchPlan, history: RunHistory) -> Rung:
    least = f"batch.minimum = {batch.minimum}"
    kept = f"micro-batch kept at {batch.size or 'its size'} ({least}"
    if checkpoints_gradients(policy, history):
        return Rung(False, f"{kept}), gradient checkpointing is already on", f"nothing smaller is left: {least}")
    if policy.memory.gradient_checkpointing != "last_resort":
        setting = f"memory.gradient_checkpointing = {policy.memory.gradient_checkpointing!r}"
        return Rung(False, f"{kept}, {setting})", f"nothing smaller is left: {least}, {setting}")
    if not history.can_checkpoint_gradients:
        return Rung(False, f"{kept})", f"nothing smaller is left: {least}")
    history.gradient_checkpointing = True
    text = f"{kept}), gradient checkpointing turned on (memory.gradient_checkpointing)"
    return Rung(True, text)
