"""The worker process of one run: started, sent requests and signals, and waited for."""

import asyncio
import re
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import structlog

from mlx_supervisor import wire
from mlx_supervisor.core import actions as act
from mlx_supervisor.core import events as ev
from mlx_supervisor.daemon.recorder import Recorder
from mlx_supervisor.daemon.shared import Shared
from mlx_supervisor.host.caffeinate import Caffeinate
from mlx_supervisor.journal.database import JournalError
from mlx_supervisor.logs.run_log import RunLog
from mlx_supervisor.process import run_lock
from mlx_supervisor.process.child import Child, ExitStatus
from mlx_supervisor.process.launch import worker_command, write_job
from mlx_supervisor.sampling.priority import yield_to_supervisor
from mlx_supervisor.settings.schema import Settings
from mlx_supervisor.settings.to_job import Past
from mlx_supervisor.state_dir import StateDirError
from mlx_supervisor.telemetry import event_of
from mlx_supervisor.wire.last_message import read_last_message
from mlx_supervisor.wire.run_lock import HeldError, RunLock, read_progress

BYE_WAIT_S = 0.5
"""How long the last frames of a worker that has exited may still be in transit."""
REQUESTS: dict[type[act.Action], type[wire.Message]] = {
    act.RequestClearCache: wire.ClearCache,
    act.RequestStop: wire.Stop,
    act.RequestAutopsy: wire.Autopsy,
    act.RequestResize: wire.Resize,
}

log = structlog.get_logger()


@dataclass(eq=False)
class WorkerProcess:
    """At most one worker at a time. `post` receives its events, on the event loop."""

    run: str
    settings: Settings
    shared: Shared
    log: RunLog
    recorder: Recorder
    post: Callable[[ev.Event], None]
    child: Child | None = None
    started_wall_s: float = 0.0
    stopped_wall_s: float = 0.0
    exit_status: int | None = None
    bye: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the worker has sent its last message."""
    device_uuid: str | None = None
    _token: str = ""
    _saved_before: int = 0
    _stderr_offset: int = 0
    _caffeinate: Caffeinate = field(default_factory=Caffeinate)
    _waiting: asyncio.Task[None] | None = None
    _blocked: asyncio.Task[None] | None = None

    def spawn(self, action: act.Spawn, limit_bytes: int, past: Past) -> None:
        """Start a worker, as soon as no other process holds the run's folder.

        Raises OSError, WireError, StateDirError or JournalError.
        """
        folder = self.shared.state.run_dir(self.run)
        try:
            lock = run_lock.take(folder)
        except HeldError:
            loop = asyncio.get_running_loop()
            self._blocked = loop.create_task(self._start_when_free(action, folder, limit_bytes, past))
            return
        try:
            self._start_holding(lock, action, folder, limit_bytes, past)
        finally:
            lock.close()  # the worker has inherited it

    async def _start_when_free(self, action: act.Spawn, folder: Path, limit_bytes: int, past: Past) -> None:
        def blocked(reason: str, lasting: bool = True) -> None:
            self.post(ev.StartBlocked(time.monotonic(), action.generation, reason, lasting))

        restart = self.settings.runs[self.run].restart
        blocked(f"{folder} is locked by a worker that is still running; it is being ended", lasting=False)
        try:
            await run_lock.end_holder(folder, restart.stop_grace_s + restart.term_grace_s, lambda: False, blocked)
            self._blocked = None
            self.spawn(action, limit_bytes, past)
        except (OSError, StateDirError, JournalError, wire.WireError) as error:
            log.error("action_failed", run=self.run, action="spawn", error=str(error))
            self._blocked = None
            self.post(ev.ActionFailed(time.monotonic(), "spawn", str(error), passing=True))

    def cancel_start(self) -> bool:
        """Cancel a start that waits for another process. Returns whether there was one."""
        blocked, self._blocked = self._blocked, None
        return blocked is not None and blocked.cancel()

    def _stop_waiting(self, generation: int) -> None:
        if self.cancel_start():
            self.post(ev.Exited(time.monotonic(), generation, None, None, "", None, 0))

    def _start_holding(self, lock: RunLock, action: act.Spawn, folder: Path, limit_bytes: int, past: Past) -> None:
        token, telemetry = secrets.token_hex(16), self.shared.telemetry
        self._token = token
        self._saved_before = newest_checkpoint(folder / "checkpoints")
        try:
            job_file = write_job(self.settings, self.run, folder, telemetry.address, action, limit_bytes, past)
        except OSError as error:  # of the state folder, not of the command that is started
            raise StateDirError(f"job.json can't be written in {folder}: {error.strerror}") from error
        self._stderr_offset = self.log.stderr_offset()
        self.bye.clear()
        self.recorder.open_generation(action, token, 0, 0.0)
        telemetry.expect(self.run, action.generation, token)
        lock.record(run_lock.holder(action.generation, token))
        command = [*worker_command(), str(job_file)]
        child = Child.spawn(command, folder, token, *self.log.descriptors(), lock.descriptors)
        lock.record(run_lock.holder(action.generation, token, child.pid, child.create_time_s))
        self._started(child, action, token, limit_bytes)

    def _started(self, child: Child, action: act.Spawn, token: str, limit_bytes: int) -> None:
        self.child = child
        yield_to_supervisor(child.pid)
        if (problem := self._caffeinate.hold(child.pid)) is not None:
            log.warning("caffeinate_failed", run=self.run, error=problem)
        self.started_wall_s = time.time()
        memory = self.settings.runs[self.run].memory
        self.shared.sampler.watch(
            *(self.run, action.generation, child.pid, limit_bytes, memory.sample_interval_s, child.brake, token),
            confirm_samples=memory.confirm_samples,
        )
        self.post(ev.Spawned(time.monotonic(), action.generation, child.pid))
        self._waiting = asyncio.get_running_loop().create_task(self._wait(child, action.generation))
        try:
            self.recorder.open_generation(action, token, child.pid, child.create_time_s)
        except JournalError as error:  # not fatal: the journal has its token, which identifies it too
            log.error("worker_pid_not_recorded", run=self.run, error=str(error))

    def request(self, action: act.Action) -> None:
        """Send the worker a request. Raises OSError when that fails."""
        fields = asdict(action)  # a request has the names of its message
        del fields["generation"]
        problem = self.shared.telemetry.send(self.run, REQUESTS[type(action)], **fields)
        if problem is not None:
            raise OSError(problem)

    def signal(self, action: act.DumpStacks | act.Terminate | act.Kill) -> None:
        """Send the worker, or its process group, a signal. Does nothing when it has ended."""
        if self.child is None:
            if not isinstance(action, act.DumpStacks):
                self._stop_waiting(action.generation)
            return
        if isinstance(action, act.DumpStacks):
            self.child.dump_stacks()
        elif isinstance(action, act.Terminate):
            self.child.terminate()
        else:
            self.child.kill()

    def watch_device(self, found: ev.DeviceFound) -> str:
        """Sample the memory of the worker's device from now on. Returns "" or why that is impossible."""
        if self.child is None:
            return ""
        self.device_uuid = found.uuid
        limit, session = found.limit_bytes, self.child.pid
        return self.shared.devices.watch(self.run, found.generation, found.uuid, limit, session, self._token)

    def device_free_bytes(self) -> int | None:
        """Of the device that the last worker used; None: unknown, or it has no memory of its own."""
        return None if self.device_uuid is None else self.shared.devices.free_bytes(self.device_uuid)

    async def close(self) -> None:
        """Release what is held for the worker, which must have ended."""
        for task in (self._waiting, self._blocked):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    async def _wait(self, child: Child, generation: int) -> None:
        try:
            status = await child.wait()
        except Exception as error:  # of any kind: the run must not wait for this worker forever
            log.error("worker_wait_failed", run=self.run, exc_info=error)
            child.kill()
            status = ExitStatus(None, None, None)
        self.shared.sampler.unwatch(self.run)
        self.shared.devices.unwatch(self.run)
        await asyncio.sleep(0)  # so that samples already delivered come before the exit, which they may explain
        if status.exit_code is not None and not self.bye.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(BYE_WAIT_S):
                    await self.bye.wait()
        self.shared.telemetry.forget(self.run)
        self._caffeinate.release()
        self.child = None
        self.stopped_wall_s = time.time()
        self.exit_status = -1 if status.exit_code is None else status.exit_code
        tail = self.log.tail_since(self._stderr_offset, wire.STDERR_TAIL_LIMIT_BYTES)
        found = newest_checkpoint(self.shared.state.path / "runs" / self.run / "checkpoints")
        self._read_last_message(generation)
        now_s, oom_killed, (first, last) = time.monotonic(), status.oom_killed, self._trained(generation, found)
        self.post(ev.Exited(now_s, generation, status.exit_code, status.signal, tail, oom_killed, found, first, last))

    def _read_last_message(self, generation: int) -> None:
        """Take the worker's last message from its file if it did not arrive."""
        if self.bye.is_set():
            return
        folder = self.shared.state.path / "runs" / self.run
        message = read_last_message(folder, self.run, generation, self._token)
        if message is not None:
            log.warning("last_message_read", run=self.run, generation=generation, outcome=message.outcome)
            self.post(event_of(message, time.monotonic()))

    def _trained(self, generation: int, saved: int) -> tuple[int, int]:
        """The first and the last update of this generation by what is on disk; 0 for none.

        `saved`: the newest checkpoint. The worker notes its updates in its lock; a disk that refused that may have
        the checkpoint.
        """
        made = read_progress(self.shared.state.path / "runs" / self.run)
        first, last = (made.resumed + 1, made.last) if made is not None and made.generation == generation else (0, 0)
        if saved > max(last, self._saved_before):
            first, last = first or self._saved_before + 1, saved
        return first, last


def newest_checkpoint(folder: Path) -> int:
    """The step of the newest checkpoint, 0 without one. A folder gets its name once all of it is durable."""
    try:
        names = [entry.name for entry in folder.iterdir()]
    except OSError:
        return 0
    return max((int(name[5:]) for name in names if re.fullmatch(r"step-[0-9]{9,18}", name)), default=0)


def drill_text(drill: wire.DrillJob) -> str:
    """A sentence with the faults that the settings inject."""
    default = wire.DrillJob()
    names = [name for name in drill.__struct_fields__ if getattr(drill, name) != getattr(default, name)]
    return "Fire drill: " + ", ".join(f"{name} = {getattr(drill, name)}" for name in names) + "."
