"""Taking over from a dead supervisor: its workers are ended, and how far they came is read from the journal."""

import time
from collections.abc import Callable

from mlx_supervisor.core import actions as act
from mlx_supervisor.core import events as ev
from mlx_supervisor.host.boot_id import boot_id
from mlx_supervisor.journal.journal import Journal, OpenGeneration
from mlx_supervisor.process.orphans import end_orphan, end_remains


async def end_left(
    left: OpenGeneration, grace_s: float, hurried: Callable[[], bool], notice: Callable[[act.Persist], None]
) -> bool:
    """Wait until this worker is gone, and kill it after `grace_s`, or as soon as `hurried` says so.

    What can't be killed is waited for, since no other worker may start beside it; False when `hurried` ended that.
    """
    if left.boot_id != boot_id():
        return True
    notice(act.Persist("recovering", f"Making sure that no worker of generation {left.generation} lives."))
    if not await end_orphan(left.pid, left.create_time_s, left.token, grace_s, hurried):
        return True
    text = f"Generation {left.generation} outlived its supervisor and was killed."
    notice(act.Persist("orphan_killed", text, act.Level.WARNING))
    told = False
    while await end_remains(0, left.token, group=False):
        if hurried():
            return False
        if not told:
            told = True
            text = f"A process of generation {left.generation} is still there, unkillable: nothing starts beside it."
            notice(act.Persist("survivor", text, act.Level.ERROR))
    return True


def recovered(left: OpenGeneration, journal: Journal, run: str) -> ev.Recovered:
    """What the journal knows of a life that its supervisor did not see the end of."""
    told = journal.life(run, left.generation)
    return ev.Recovered(
        time.monotonic(),
        left.generation,
        left.boot_id != boot_id(),
        first_step=told.first_step,
        last_step=told.last_step,
        batch_size=told.batch_size or left.batch_size,
        accumulation=told.accumulation,
        train_s=told.train_s,
        lived_s=max((told.last_wall_s or left.opened_s) - left.opened_s, 0.0),
        peak_footprint_bytes=told.peak_footprint_bytes,
    )
