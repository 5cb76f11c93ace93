"""A leak in each forward pass: halving the micro-batch doubles the passes of an update, and with them the leak.

Such a leak looks like pressure, because the generations get too short for a verdict. The growth per update at two
micro-batches of the same effective batch shows it: what a batch needs falls with its size, such a leak does not.
"""

from mlx_supervisor.core.diagnosis.causes import Cause
from mlx_supervisor.core.history import RunHistory
from mlx_supervisor.core.restart.batch import BatchPlan
from mlx_supervisor.core.restart.escalation import Rung
from mlx_supervisor.core.restart.update_growth import LEAST_UPDATES, UpdateGrowth
from mlx_supervisor.core.words import growth_rate

JUDGED_CAUSES = frozenset({Cause.PRESSURE, Cause.LEAK})
"""What the breaker judged. A kernel or a driver that refuses memory has its own reasons."""
UNSLOWED = 0.75
"""Growth per update at the smaller micro-batch, as a share of that at the larger one, from which it did not help."""
WORSE = 1.25
"""The same for a death that is known as a leak: the smaller micro-batch gave room, so it stays unless it does harm."""


def learn(
    batch: BatchPlan, past: RunHistory, growth: UpdateGrowth, cause: Cause, *, limit_bytes: int, progress: bool
) -> Rung | None:
    """The response to a death by such a leak, else None; changes `batch` and `past`.

    Only while every generation makes progress: otherwise the escalation ladder goes on.
    """
    if cause not in JUDGED_CAUSES or batch.size is None:
        return None
    now_bytes, former_bytes = growth.bytes_per_update(limit_bytes), past.growth_bytes
    comparable = past.growth_size is not None and past.growth_effective == batch.effective
    as_before = growth.updates < LEAST_UPDATES or (now_bytes is not None and now_bytes >= UNSLOWED * former_bytes)
    if past.leak_kept and comparable and progress and batch.size == past.growth_size and as_before:
        return Rung(False, f"micro-batch kept at {batch.size}: a smaller one did not slow the leak")
    least = WORSE if cause is Cause.LEAK else UNSLOWED
    if (
        comparable
        and progress
        and not past.leak_kept
        and now_bytes is not None
        and past.growth_size is not None
        and growth.size == batch.size < past.growth_size
        and now_bytes >= least * former_bytes
    ):
        batch.restore(past.growth_size)
        past.leak_kept = True
        rates = f"{growth_rate(former_bytes)} before, {growth_rate(now_bytes)} after"
        return Rung(False, f"micro-batch restored to {batch.size}: halving did not slow the leak ({rates})")
    past.leak_kept = False
    known = now_bytes is not None and growth.size == batch.size
    past.growth_size = batch.size if known else None
    past.growth_effective = batch.effective if known else None
    past.growth_bytes = now_bytes if known and now_bytes is not None else 0.0
    return None
