"""The supervisor process: joins sources, machines and adapters; nothing else."""

import asyncio
import shutil
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import structlog

from mlx_supervisor.core import events as ev
from mlx_supervisor.daemon.run import SupervisedRun
from mlx_supervisor.daemon.shared import Observer, Shared
from mlx_supervisor.host import footprint, sd_notify
from mlx_supervisor.host.boot_id import boot_id
from mlx_supervisor.journal.journal import Journal, OpenGeneration
from mlx_supervisor.process.orphans import end_orphaned_worker
from mlx_supervisor.sampling.worker_sampler import WorkerSampler
from mlx_supervisor.settings.schema import Settings
from mlx_supervisor.state_dir import StateDir
from mlx_supervisor.telemetry import Telemetry

HOUSEKEEPING_INTERVAL_S = 1.0
UNKNOWN_ORPHAN_GRACE_S = 70.0
"""For a worker of a run that the settings no longer know to checkpoint and leave, as the defaults would give it."""

log = structlog.get_logger()


class Daemon:
    """All runs of one settings file. `open`, then command the runs, then `close`.

    `open` raises StateDirError, JournalError, SettingsError or OSError; nothing is left half-started then.
    """

    def __init__(self, settings: Settings, state: StateDir, observers: Sequence[Observer] = ()) -> None:
        self.settings = settings
        self.state = state
        self.runs: dict[str, SupervisedRun] = {}
        self.shutdown_wanted = asyncio.Event()
        self.restart_wanted = False
        self._observers = observers
        self._recoveries: set[asyncio.Task[None]] = set()
        self._unknown_orphans: set[asyncio.Task[None]] = set()

    async def open(self, forget: Sequence[str] = ()) -> None:
        """Take up the sources and the runs; begin to end the workers of a dead supervisor.

        `forget`: runs to begin anew, once their last worker is sure to be gone.
        """
        loop = asyncio.get_running_loop()
        self._journal = Journal(self.state.journal, lambda text: log.error("journal", error=text))
        try:
            self._sampler = WorkerSampler(
                lambda run, sample: _ignore_closed(loop, lambda: self._on_sample(run, sample)),
            )
            self._telemetry = Telemetry(self.state.telemetry_socket, self._on_message, self._on_bad_frames)
            self._shared = Shared(self.state, self._journal, self._telemetry, self._sampler, footprint.machine_bytes())
            await self._forget(forget)
            for name in self.settings.runs:
                self.add(name)
        except BaseException:
            await self._close_sources()
            raise
        self._recover()
        self._housekeeping = loop.create_task(self._keep_house())

    def add(self, name: str) -> SupervisedRun:
        """Take a run of the settings into use."""
        run = SupervisedRun(name, self.settings, self._shared, self._observers)
        self.runs[name] = run
        return run

    async def take_up(self, name: str) -> SupervisedRun:
        """`add`, and be sure that no worker of a dead supervisor is at it."""
        run = self.add(name)
        orphans = [orphan for orphan in self._journal.open_generations() if orphan.run == name]
        if orphans:
            self._recover_run(run, orphans)
            await run.until(lambda: not run.recovery.active)
        return run

    async def remove(self, name: str) -> None:
        """Take a run that is at rest out of use."""
        await self.runs.pop(name).close()

    async def start_wanted(self) -> None:
        """Start what starts by itself, and what a supervisor that ended before its runs was still at."""
        await self.recovered()
        for name, run in list(self.runs.items()):
            history = run.machine.history
            autostart = run.settings.runs[name].autostart
            fresh = history.generation == 0 and autostart
            unfinished = history.wanted or (autostart and history.outcome == "")
            if run.at_rest and (fresh or unfinished):
                run.command(ev.CommandKind.START, "autostart")

    async def recovered(self) -> None:
        """Until no worker of a dead supervisor is running."""
        if self._recoveries:
            await asyncio.gather(*self._recoveries)

    async def _forget(self, names: Sequence[str]) -> None:
        """Begin runs anew: the journal forgets them, their folders are set aside as `NAME.previous` (one is kept)."""
        for orphan in self._journal.open_generations():
            if orphan.run in names and orphan.boot_id == boot_id():
                await end_orphaned_worker(orphan.pid, orphan.create_time_s, orphan.token, grace_s=0.0)
        for name in names:
            folder = self.state.run_dir(name)
            previous = folder.with_name(f"{name}.previous")
            if previous.exists():
                shutil.rmtree(previous)
            folder.rename(previous)
            self._journal.forget_run(name)

    def kill_all(self, reason: str) -> None:
        """Every worker ends now; what is lost is at most one checkpoint interval."""
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
        """Give everything back. Workers must have ended (`suspend`)."""
        tasks = [self._housekeeping, *self._recoveries, *self._unknown_orphans]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._close_sources()

    async def _close_sources(self) -> None:
        for run in self.runs.values():
            await run.close()
        if hasattr(self, "_telemetry"):
            self._telemetry.close()
        if hasattr(self, "_sampler"):
            self._sampler.close()
        self._journal.close()

    # ---- sources

    def _on_sample(self, name: str, sample: ev.Sample | ev.SampleMissing) -> None:
        self._sampler.delivered()
        run = self.runs.get(name)
        if run is not None:
            run.post(sample)

    def _on_message(self, name: str, event: ev.Event) -> None:
        run = self.runs.get(name)
        if run is not None:
            run.post(event)

    def _on_bad_frames(self, text: str, counts: dict[str, int]) -> None:
        log.warning("telemetry frames dropped", latest=text, **{f"dropped_{kind}": n for kind, n in counts.items()})

    # ---- upkeep

    def _recover(self) -> None:
        by_run: dict[str, list[OpenGeneration]] = {}
        for orphan in self._journal.open_generations():
            by_run.setdefault(orphan.run, []).append(orphan)
        for name, orphans in by_run.items():
            run = self.runs.get(name)
            if run is None:
                log.warning("a worker of a run that is not in the settings may live", run=name, pid=orphans[-1].pid)
                self._keep(self._unknown_orphans, self._end_unknown_orphans(orphans))
                continue
            self._recover_run(run, orphans)

    def _recover_run(self, run: SupervisedRun, orphans: list[OpenGeneration]) -> None:
        run.recovery.active = True
        self._keep(self._recoveries, run.recovery.recover(orphans))

    def _keep(self, tasks: set[asyncio.Task[None]], coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    async def _end_unknown_orphans(self, orphans: list[OpenGeneration]) -> None:
        """Nobody watches their memory. The journal keeps them open: the run may come back."""
        for orphan in orphans:
            if orphan.boot_id != boot_id():
                continue
            if await end_orphaned_worker(orphan.pid, orphan.create_time_s, orphan.token, UNKNOWN_ORPHAN_GRACE_S):
                log.warning("a worker of a run that is not in the settings was killed", run=orphan.run, pid=orphan.pid)

    async def _keep_house(self) -> None:
        watchdog_s = sd_notify.watchdog_interval_s()
        next_watchdog_s = time.monotonic() + (watchdog_s or 0.0) / 2  # READY comes first
        while True:
            for run in list(self.runs.values()):
                run.tend()
            if watchdog_s is not None and time.monotonic() >= next_watchdog_s:
                sd_notify.watchdog()
                next_watchdog_s = time.monotonic() + watchdog_s / 2
            await asyncio.sleep(min(HOUSEKEEPING_INTERVAL_S, (watchdog_s or HOUSEKEEPING_INTERVAL_S) / 2))


def _ignore_closed(loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> None:
    try:
        loop.call_soon_threadsafe(callback)
    except RuntimeError:  # the loop ended first: nobody waits for this sample any more
        return
