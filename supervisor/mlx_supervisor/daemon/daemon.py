"""The supervisor process: connects event sources, machines and adapters."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import structlog

from mlx_supervisor.core import events as ev
from mlx_supervisor.core.machine.starting import AUTOSTART
from mlx_supervisor.daemon.recorder import load_history
from mlx_supervisor.daemon.recovery import not_started, unrecorded, unrecorded_worker
from mlx_supervisor.daemon.run import SupervisedRun
from mlx_supervisor.daemon.shared import Observer, Shared
from mlx_supervisor.host import sd_notify
from mlx_supervisor.host.boot_id import boot_id
from mlx_supervisor.host.memory import machine_bytes
from mlx_supervisor.journal.journal import Journal, OpenGeneration
from mlx_supervisor.process.orphans import end_orphaned_worker
from mlx_supervisor.process.run_lock import end_holder, held
from mlx_supervisor.sampling.device_sampler import DeviceSampler
from mlx_supervisor.sampling.worker_sampler import WorkerSampler
from mlx_supervisor.settings.schema import Settings
from mlx_supervisor.state_dir import StateDir, StateDirError, owner_of, record_owner, set_aside
from mlx_supervisor.telemetry import Telemetry
from mlx_supervisor.wire.run_lock import LOCK_FILE

HOUSEKEEPING_INTERVAL_S = 1.0
PAUSE_S = 2.0
"""Housekeeping that is this late means that the supervisor did not run."""
UNKNOWN_ORPHAN_GRACE_S = 70.0
"""Grace period of an orphan whose run is no longer in the settings: the defaults' stop and SIGTERM grace together."""

log = structlog.get_logger()


class Daemon:
    """All runs of one settings file. Call `open`, command the runs, call `close`.

    `open` raises StateDirError, JournalError, SettingsError or OSError, and then leaves nothing open. `shared` exists
    from then on.
    """

    def __init__(self, settings: Settings, state: StateDir, observers: Sequence[Observer] = ()) -> None:
        self.settings = settings
        self.state = state
        self.runs: dict[str, SupervisedRun] = {}
        self.set_aside: dict[str, Path] = {}
        """Where the folders of runs that were started over are now."""
        self.shutdown_requested = asyncio.Event()
        self.restart_requested = False
        self._observers = observers
        self._recoveries: set[asyncio.Task[None]] = set()
        self._unknown_orphans: set[asyncio.Task[None]] = set()

    async def open(self, forget: Sequence[str] = (), listen: Callable[[], Awaitable[None]] | None = None) -> None:
        """Open the event sources and the runs; start to end the orphans of a dead supervisor.

        `forget`: runs to start over, after their last worker has ended. `listen`: opens what commands the runs; nothing
        is started before it has returned, so that the caller can stop what is started.
        """
        loop = asyncio.get_running_loop()
        async with AsyncExitStack() as opened:
            journal = Journal(self.state.journal, lambda text: log.error("journal_failed", error=text))
            opened.callback(_close_journal, journal)
            sampler = WorkerSampler(lambda run, sample: _ignore_closed(loop, lambda: self._on_sample(run, sample)))
            opened.callback(sampler.close)
            devices = DeviceSampler(lambda run, sample: _ignore_closed(loop, lambda: self._on_message(run, sample)))
            opened.callback(devices.close)
            telemetry = Telemetry(self.state.telemetry_socket, self._on_message, self._on_bad_frames)
            opened.callback(telemetry.close)
            opened.push_async_callback(self._close_runs)
            self.shared = Shared(self.state, journal, telemetry, sampler, machine_bytes(), devices)
            await self._forget(forget)
            for name in self.settings.runs:
                self.add(name)
            if listen is not None:
                await listen()
            self._opened = opened.pop_all()
        self.recover()
        self._housekeeping = loop.create_task(self._run_housekeeping())

    def add(self, name: str) -> SupervisedRun:
        """Set up a run of the settings."""
        run = SupervisedRun(name, self.settings, self.shared, self._observers)
        self.runs[name] = run
        return run

    async def take_up(self, name: str) -> SupervisedRun:
        """`add`, and wait until no orphan of this run is left."""
        run = self.add(name)
        orphans = [orphan for orphan in self.shared.journal.open_generations() if orphan.run == name]
        self._recover_run(run, orphans)
        await run.until(lambda: not run.recovery.active)
        return run

    async def remove(self, name: str) -> None:
        """Remove a run that is at rest."""
        await self.runs.pop(name).close()

    async def autostart(self) -> None:
        """Start the runs with `autostart`, and those that were running when the last supervisor ended.

        A run whose stop the last supervisor had acknowledged is stopped.
        """
        await self.recovered()
        for name, run in list(self.runs.items()):
            history = run.machine.history
            autostart = run.settings.runs[name].autostart
            fresh = history.generation == 0 and autostart
            unfinished = history.unfinished or (autostart and history.outcome == "")
            if run.at_rest and history.stop_requested:
                run.command(ev.CommandKind.STOP, history.stop_requested)
            elif run.at_rest and (fresh or unfinished):
                run.command(ev.CommandKind.START, AUTOSTART)

    async def recovered(self) -> None:
        """Wait until no orphan of a dead supervisor is running."""
        if self._recoveries:
            await asyncio.gather(*self._recoveries)

    async def _forget(self, names: Sequence[str]) -> None:
        """Start runs over: the journal forgets them, their folders are set aside."""
        for orphan in self.shared.journal.open_generations():
            if orphan.run in names and orphan.boot_id == boot_id():
                await end_orphaned_worker(orphan.pid, orphan.create_time_s, orphan.token, grace_s=0.0)
        for name in names:
            folder = self.state.run_dir(name)
            await _free(folder)
            owner = load_history(self.shared.journal, name).settings_file
            if owner and not owner_of(folder):
                record_owner(folder, name, owner)
            if (kept := set_aside(folder, self.settings.runs)) is not None:
                self.set_aside[name] = kept
            self.shared.journal.forget_run(name)

    def kill_all(self, reason: str) -> None:
        """Kill every worker now. At most one checkpoint interval is lost."""
        for run in self.runs.values():
            if not run.at_rest:
                run.command(ev.CommandKind.KILL, reason)

    async def suspend(self) -> None:
        """Have every worker checkpoint and exit; the next supervisor resumes the runs."""
        for run in self.runs.values():
            if not run.at_rest and not run.machine.stopping:  # a run that is being stopped stays stopped
                run.command(ev.CommandKind.SUSPEND, "the supervisor is shutting down")
        await asyncio.gather(*(run.until(lambda run=run: run.at_rest) for run in self.runs.values()))  # type: ignore[misc]

    async def close(self) -> None:
        """Close everything. Workers must have ended (`suspend`)."""
        tasks = [self._housekeeping, *self._recoveries, *self._unknown_orphans]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._opened.aclose()

    async def _close_runs(self) -> None:
        for run in self.runs.values():
            await run.close()

    # ---- sources

    def _on_sample(self, name: str, sample: ev.Sample | ev.SampleMissing) -> None:
        self.shared.sampler.delivered()
        self._on_message(name, sample)

    def _on_message(self, name: str, event: ev.Event) -> None:
        run = self.runs.get(name)
        if run is not None:
            run.post(event)

    def _on_bad_frames(self, text: str, counts: dict[str, int]) -> None:
        log.warning("frames_dropped", latest=text, **{f"dropped_{kind}": n for kind, n in counts.items()})

    # ---- orphans and housekeeping

    def recover(self) -> None:
        """Start to end the orphans of a dead supervisor; `recovered` waits for those of known runs."""
        by_run: dict[str, list[OpenGeneration]] = {}
        for orphan in self.shared.journal.open_generations():
            by_run.setdefault(orphan.run, []).append(orphan)
        for name, run in self.runs.items():
            self._recover_run(run, by_run.get(name, []))
        for name, orphans in by_run.items():
            if name not in self.runs:
                log.warning("ending_unknown_orphan", run=name, pid=orphans[-1].pid)
                self._track(self._unknown_orphans, self._end_unknown_orphans(orphans))

    def _recover_run(self, run: SupervisedRun, orphans: list[OpenGeneration]) -> None:
        if (worker := unrecorded_worker(run.machine, run.name, run.folder)) is not None:
            orphans = [*orphans, worker]
        if not orphans and not held(run.folder) and not unrecorded(run.machine, run.folder):
            not_started(run.machine, self.shared.journal, run.name)
            return
        run.recovery.active = True
        self._track(self._recoveries, run.recovery.recover(orphans))

    def _track(self, tasks: set[asyncio.Task[None]], coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    async def _end_unknown_orphans(self, orphans: list[OpenGeneration]) -> None:
        """End workers whose run is not in the settings: their memory is not watched. Their generations stay open."""
        for orphan in orphans:
            if orphan.boot_id != boot_id():
                continue
            if await end_orphaned_worker(orphan.pid, orphan.create_time_s, orphan.token, UNKNOWN_ORPHAN_GRACE_S):
                log.warning("unknown_orphan_killed", run=orphan.run, pid=orphan.pid)

    async def _run_housekeeping(self) -> None:
        watchdog_s = sd_notify.watchdog_interval_s()
        next_watchdog_s = last_s = time.monotonic()
        while True:
            now_s = time.monotonic()
            paused_s, last_s = now_s - last_s - HOUSEKEEPING_INTERVAL_S, now_s
            for run in list(self.runs.values()):
                if paused_s > PAUSE_S:
                    run.post(ev.Paused(now_s, paused_s))
                else:
                    run.housekeep()
            if watchdog_s is not None and time.monotonic() >= next_watchdog_s:
                sd_notify.watchdog()
                next_watchdog_s = time.monotonic() + watchdog_s / 2
            await asyncio.sleep(min(HOUSEKEEPING_INTERVAL_S, (watchdog_s or HOUSEKEEPING_INTERVAL_S) / 2))


async def _free(folder: Path) -> None:
    """End the worker that holds the folder. Raises StateDirError when that fails."""
    reasons: list[str] = []
    if not await end_holder(folder, 0.0, lambda: bool(reasons), reasons.append):
        raise StateDirError(f"--fresh: {reasons[-1]}")
    (folder / LOCK_FILE).unlink(missing_ok=True)  # it names a generation of the former run


def _close_journal(journal: Journal) -> None:
    journal.close()
    if journal.dropped:
        log.error("journal_rows_lost", count=journal.dropped)


def _ignore_closed(loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> None:
    try:
        loop.call_soon_threadsafe(callback)
    except RuntimeError:  # the loop has ended
        return
