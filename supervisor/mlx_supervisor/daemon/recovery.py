"""Recovery from a dead supervisor: ends its workers, and reads their progress from the journal."""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import structlog

from mlx_supervisor.core import actions as act
from mlx_supervisor.core import events as ev
from mlx_supervisor.core.diagnosis.causes import Cause
from mlx_supervisor.core.history import Generation
from mlx_supervisor.core.machine.run_state import Run
from mlx_supervisor.host.boot_id import boot_id
from mlx_supervisor.journal.journal import Journal, OpenGeneration
from mlx_supervisor.process import run_lock
from mlx_supervisor.process.orphans import end_orphaned_worker, kill_orphans
from mlx_supervisor.wire.run_lock import Progress, read_holder, read_progress

log = structlog.get_logger()


@dataclass(eq=False)
class Recovery:
    """Recovery of one run. `active` while it is under way; `changed` is called at its end.

    `saved_step` returns the step of the newest checkpoint; the worker may have saved it after its supervisor died.
    `hurried`: set it to kill the orphans at once instead of waiting for them.
    """

    run: str
    journal: Journal
    machine: Run
    notice: Callable[[act.Notice], None]
    post: Callable[[ev.Event], None]
    changed: Callable[[], None]
    active: bool = False
    hurried: bool = False
    saved_step: Callable[[], int] = lambda: 0
    folder: Path | None = None
    _waiting: asyncio.Task[None] | None = None

    async def recover(self, orphans: Sequence[OpenGeneration]) -> None:
        """End the orphans, then report their progress to the machine as an `ev.Recovered`."""
        self.active = True
        try:
            restart = self.machine.policy.restart
            grace_s = restart.stop_grace_s + restart.term_grace_s
            for orphan in orphans:
                if not await end_orphaned_generation(orphan, grace_s, lambda: self.hurried, self.notice):
                    self._wait_later(orphans)
                    return
            if not await self._end_holder(grace_s, lambda: self.hurried):
                self._wait_later(orphans)
                return
            self._take_over(orphans)
        except Exception as error:  # the run can be started: its last worker has ended, or never started
            log.error("recovery_failed", run=self.run, exc_info=error)
        finally:
            self.active = self.hurried = False
            self.changed()

    async def close(self) -> None:
        """Stop waiting for an unkillable worker."""
        if self._waiting is not None:
            self._waiting.cancel()
            await asyncio.gather(self._waiting, return_exceptions=True)

    def _wait_later(self, orphans: Sequence[OpenGeneration]) -> None:
        self.machine.survivor = orphans[-1].generation if orphans else self.machine.history.generation
        self._waiting = asyncio.get_running_loop().create_task(self._wait_for(orphans))

    async def _end_holder(self, grace_s: float, hurried: Callable[[], bool]) -> bool:
        """The lock of the run's folder decides, whatever the journal has. False: `hurried` ended the wait."""
        if self.folder is None:
            return True
        if not run_lock.held(self.folder):
            return await self._end_unrecorded(self.folder)
        self.notice(act.Notice("recovering", f"{self.folder} is locked by another process; ending it."))

        def blocked(reason: str) -> None:
            self.notice(act.Notice("survivor", f"New starts are blocked: {reason}.", act.Severity.ERROR))

        return await run_lock.end_holder(self.folder, grace_s, hurried, blocked)

    async def _end_unrecorded(self, folder: Path) -> bool:
        """End what a worker that the journal does not have has started; it has ended itself."""
        holder = read_holder(folder)
        if holder is not None and holder.token and holder.generation > self.machine.history.generation:
            await kill_orphans(0, holder.token, group=False)
        return True

    async def _wait_for(self, orphans: Sequence[OpenGeneration]) -> None:
        """Starts are refused until a worker that survived SIGKILL has ended."""
        for orphan in orphans:
            await end_orphaned_generation(orphan, 0.0, lambda: False, lambda _: None)
        await self._end_holder(0.0, lambda: False)
        self._take_over(orphans)

    def _take_over(self, orphans: Sequence[OpenGeneration]) -> None:
        if not orphans:
            self.machine.survivor = None
            return
        for orphan in orphans[:-1]:
            self.journal.close_generation(self.run, orphan.generation, {"ended": "lost", "cause": "unknown"})
        made = None if self.folder is None else read_progress(self.folder)
        lost = trained_on(recovered(orphans[-1], self.journal, self.run), self.machine, self.saved_step(), made)
        self.post(lost)


async def end_orphaned_generation(
    orphan: OpenGeneration, grace_s: float, hurried: Callable[[], bool], notice: Callable[[act.Notice], None]
) -> bool:
    """Wait until this worker has ended, and kill it after `grace_s` seconds or as soon as `hurried` returns True.

    A worker that survives SIGKILL is waited for, since no other may run at the same time. False: `hurried` ended that.
    """
    if orphan.boot_id != boot_id():
        return True
    notice(act.Notice("recovering", f"Checking for a leftover worker (generation {orphan.generation})."))
    if not await end_orphaned_worker(orphan.pid, orphan.create_time_s, orphan.token, grace_s, hurried):
        return True
    text = f"Killed orphaned worker (generation {orphan.generation})."
    notice(act.Notice("orphan_killed", text, act.Severity.WARNING))
    reported = False
    while await kill_orphans(0, orphan.token, group=False):
        if hurried():
            return False
        if not reported:
            reported = True
            text = f"A process of generation {orphan.generation} survived SIGKILL; new starts are blocked."
            notice(act.Notice("survivor", text, act.Severity.ERROR))
    return True


def recovered(orphan: OpenGeneration, journal: Journal, run: str) -> ev.Recovered:
    """The progress of a generation whose supervisor died, from the journal."""
    progress = journal.figures(run, orphan.generation)
    return ev.Recovered(
        time.monotonic(),
        orphan.generation,
        orphan.boot_id != boot_id(),
        first_step=progress.first_step,
        last_step=progress.last_step,
        batch_size=progress.batch_size or orphan.batch_size,
        accumulation=progress.accumulation,
        train_s=progress.train_s,
        uptime_s=max((progress.last_wall_s or orphan.opened_s) - orphan.opened_s, 0.0),
        peak_footprint_bytes=progress.peak_footprint_bytes,
    )


def trained_on(lost: ev.Recovered, machine: Run, saved_step: int, made: Progress | None = None) -> ev.Recovered:
    """`lost` with the updates that the worker made when no supervisor recorded them any more.

    `made`: what the worker noted in its lock. Without it, they count as far as they were saved.
    """
    if made is not None and made.generation == lost.generation and made.last >= lost.last_step:
        return replace(lost, first_step=made.resumed + 1, last_step=made.last)
    known = max(lost.last_step, machine.history.highest_step)
    return replace(lost, first_step=lost.first_step or known + 1, last_step=saved_step) if saved_step > known else lost


def unrecorded(machine: Run, folder: Path) -> bool:
    """Whether the run's folder had a worker that the journal, which was lost, does not have."""
    holder = read_holder(folder)
    return holder is not None and holder.generation > machine.history.generation


def unrecorded_worker(machine: Run, run: str, folder: Path) -> OpenGeneration | None:
    """The generation that holds the lock of the run's folder, if the journal, which was lost, does not have it.

    The history then continues with its number.
    """
    holder = read_holder(folder)
    if holder is None or not unrecorded(machine, folder) or not run_lock.held(folder):
        return None
    machine.history.generation = holder.generation
    machine.history.begin_generation()
    machine.history.unfinished = True
    process = (holder.pid, holder.started_s, holder.token, holder.boot)
    return OpenGeneration(run, holder.generation, *process, None, None, holder.started_s or time.time())


def not_started(machine: Run, journal: Journal, run: str) -> None:
    """Record the last generation as not started, if its supervisor died before it recorded the start."""
    past = machine.history
    if past.unfinished and past.generation > journal.last_generation(run):
        record = Generation(past.generation, 0.0, batch_size=machine.batch.size)
        journal.close_generation(run, past.generation, record.record(0.0, "not started", Cause.SUPERVISOR_LOST.value))
