"""Taking over from a dead supervisor: its workers are ended, and how far they came is read from the journal."""

import asyncio
import time
from collections.abc import Callable, Sequence

import structlog

from mlx_supervisor.core import actions as act
from mlx_supervisor.core import events as ev
from mlx_supervisor.core.machine.run_state import Run
from mlx_supervisor.host.boot_id import boot_id
from mlx_supervisor.journal.journal import Journal, OpenGeneration
from mlx_supervisor.process.orphans import end_orphaned_worker, kill_orphans

log = structlog.get_logger()


class Recovery:
    """Of one run, from a dead supervisor. `active` from before its start to its end; `changed` is called then."""

    def __init__(
        self,
        run: str,
        journal: Journal,
        machine: Run,
        notice: Callable[[act.Notice], None],
        post: Callable[[ev.Event], None],
        changed: Callable[[], None],
    ) -> None:
        self.active = False
        self._run = run
        self._journal = journal
        self._machine = machine
        self._notice = notice
        self._post = post
        self._changed = changed
        self._hurried = False
        self._waiting: asyncio.Task[None] | None = None

    def hurry(self) -> None:
        """Kill the orphans at once instead of waiting for them."""
        self._hurried = True

    async def recover(self, orphans: Sequence[OpenGeneration]) -> None:
        """Make sure that no worker of a dead supervisor is running, and learn how far it came."""
        self.active = True
        try:
            restart = self._machine.policy.restart
            grace_s = restart.stop_grace_s + restart.term_grace_s
            for orphan in orphans:
                if not await end_orphaned_generation(orphan, grace_s, lambda: self._hurried, self._notice):
                    self._machine.refuse_starts(orphan.generation)
                    self._waiting = asyncio.get_running_loop().create_task(self._wait_for(orphans))
                    return
            self._take_over(orphans)
        except Exception as error:  # the run can be started all the same: its last worker is gone, or never was
            log.error("recovery_failed", run=self._run, exc_info=error)
        finally:
            self.active = self._hurried = False
            self._changed()

    async def close(self) -> None:
        """Stop waiting for what can't be killed."""
        if self._waiting is not None:
            self._waiting.cancel()
            await asyncio.gather(self._waiting, return_exceptions=True)

    async def _wait_for(self, orphans: Sequence[OpenGeneration]) -> None:
        """A worker that can't be killed: until it is gone, starts are refused."""
        for orphan in orphans:
            await end_orphaned_generation(orphan, 0.0, lambda: False, lambda _: None)
        self._take_over(orphans)

    def _take_over(self, orphans: Sequence[OpenGeneration]) -> None:
        for orphan in orphans[:-1]:
            self._journal.close_generation(self._run, orphan.generation, {"ended": "lost", "cause": "unknown"})
        self._post(recovered(orphans[-1], self._journal, self._run))


async def end_orphaned_generation(
    orphan: OpenGeneration, grace_s: float, hurried: Callable[[], bool], notice: Callable[[act.Notice], None]
) -> bool:
    """Wait until this worker is gone, and kill it after `grace_s`, or as soon as `hurried` says so.

    What can't be killed is waited for, since no other worker may start beside it; False when `hurried` ended that.
    """
    if orphan.boot_id != boot_id():
        return True
    notice(act.Notice("recovering", f"Making sure that no worker of generation {orphan.generation} lives."))
    if not await end_orphaned_worker(orphan.pid, orphan.create_time_s, orphan.token, grace_s, hurried):
        return True
    text = f"Generation {orphan.generation} outlived its supervisor and was killed."
    notice(act.Notice("orphan_killed", text, act.Severity.WARNING))
    told = False
    while await kill_orphans(0, orphan.token, group=False):
        if hurried():
            return False
        if not told:
            told = True
            text = f"A process of generation {orphan.generation} is still there, unkillable: nothing starts beside it."
            notice(act.Notice("survivor", text, act.Severity.ERROR))
    return True


def recovered(orphan: OpenGeneration, journal: Journal, run: str) -> ev.Recovered:
    """What the journal knows of a life that its supervisor did not see the end of."""
    told = journal.life(run, orphan.generation)
    return ev.Recovered(
        time.monotonic(),
        orphan.generation,
        orphan.boot_id != boot_id(),
        first_step=told.first_step,
        last_step=told.last_step,
        batch_size=told.batch_size or orphan.batch_size,
        accumulation=told.accumulation,
        train_s=told.train_s,
        lived_s=max((told.last_wall_s or orphan.opened_s) - orphan.opened_s, 0.0),
        peak_footprint_bytes=told.peak_footprint_bytes,
    )
