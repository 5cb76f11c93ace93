"""One run: its machine, and the adapters that carry out the machine's actions."""

import asyncio
import errno
import math
import time
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import structlog

from mlx_supervisor import wire
from mlx_supervisor.core import actions as act
from mlx_supervisor.core import events as ev
from mlx_supervisor.core.machine.machine import apply
from mlx_supervisor.core.machine.run_state import Run
from mlx_supervisor.core.machine.states import AT_REST, State
from mlx_supervisor.daemon.deadline_timer import DeadlineTimer
from mlx_supervisor.daemon.identity import claim, notice_without_history
from mlx_supervisor.daemon.recorder import Recorder, load_history
from mlx_supervisor.daemon.recovery import Recovery
from mlx_supervisor.daemon.shared import Observer, Observers, Shared
from mlx_supervisor.daemon.summary import SummaryFile, summary_of
from mlx_supervisor.daemon.worker_process import WorkerProcess, drill_text, newest_checkpoint
from mlx_supervisor.journal.database import JournalError
from mlx_supervisor.logs.run_log import RunLog
from mlx_supervisor.process.launch import keep_job
from mlx_supervisor.process.task_digest import task_digest
from mlx_supervisor.sampling.host_poller import HostPoller
from mlx_supervisor.settings.schema import Settings
from mlx_supervisor.settings.to_job import Past
from mlx_supervisor.settings.to_policy import policy_of
from mlx_supervisor.state_dir import StateDirError

FAILURE_NOTICE_INTERVAL_S = 60.0
"""At most one notice in this time for failures of the same action."""
TRANSIENT_ERRORS = wire.DISK_ERRORS | {errno.EAGAIN, errno.EMFILE, errno.ENFILE, errno.ENOMEM}
"""Errors that may pass within a minute; a start that fails with any other is likely to fail again."""
STATE_DIR_ERRORS = TRANSIENT_ERRORS | {errno.EACCES, errno.EPERM, errno.ENOENT}
"""The same for the state folder, whose permissions or disk may come back."""
SILENCE_S = 5.0
"""After this long without a sample, the sampler may have failed: each further second counts as a missing sample."""
ACTION_TEXTS = {
    "SaveHistory": "Saving the run's history to the journal",
    "CloseGeneration": "Recording the worker's end in the journal",
    "Finish": "Writing summary.json",
}

log = structlog.get_logger()


class SupervisedRun:
    """Handles events one at a time, in order. An action that fails becomes an event.

    Raises SettingsError, StateDirError or JournalError when the run can't be set up.
    """

    def __init__(self, name: str, settings: Settings, shared: Shared, observers: Sequence[Observer] = ()) -> None:
        self.name = name
        self.settings = settings
        self._observers = Observers(name, observers)
        policy = policy_of(settings.runs[name], shared.machine_bytes, f"runs.{name}")
        history = load_history(shared.journal, name)
        claim(history, name, settings, shared.state)
        self.folder = shared.state.run_dir(name)
        (self.folder / "logs").mkdir(mode=0o700, exist_ok=True)
        self.log = RunLog(self.folder / "logs")
        self._recorder = Recorder(name, shared.journal, self.log)
        self.machine = Run(policy, history, seed=zlib.crc32(name.encode()))
        self._events: deque[ev.Event] = deque()
        self._working = False
        self._broken = False
        self._failure_notice_s: dict[str, float] = {}
        self._changed = asyncio.Event()
        self.unsaved = ""
        """Why the latest change of the history is not durable; "" when it is."""
        self._drill_reported = False
        self._device_problem = ""
        self._first_notice = None if history.generation > 0 else notice_without_history(name, settings, shared.state)
        self._host = HostPoller(self.post, lambda: self.worker.device_free_bytes())
        self.worker = WorkerProcess(name, settings, shared, self.log, self._recorder, self._post_worker)
        self.recovery = Recovery(name, shared.journal, self.machine, self._notice, self.post, self._changed.set)
        self.recovery.saved_step = lambda: newest_checkpoint(self.folder / "checkpoints")
        self.recovery.folder = self.folder
        self._summary_file = SummaryFile(self.folder)
        self._timer = DeadlineTimer(name, self.machine.next_deadline, self._on_deadline)

    # ---- for the daemon

    @property
    def pid(self) -> int | None:
        """Of the running worker."""
        return None if self.worker.child is None else self.worker.child.pid

    @property
    def at_rest(self) -> bool:
        """Whether there is no worker, and none is due to start."""
        return self.machine.state in AT_REST and not (self._broken and self.worker.child is not None)

    def command(self, kind: ev.CommandKind, reason: str = "") -> None:
        """A command from outside. During recovery only KILL has an effect: it kills the orphans at once."""
        if self.recovery.active:
            if kind is ev.CommandKind.KILL:
                self.recovery.hurried = True
            return
        if self.at_rest:
            self._host.poll()
            self.machine.task_digest = task_digest(self.settings, self.name)
        self.post(ev.Command(time.monotonic(), kind, reason))

    def signal(self, number: int) -> None:
        """Send a signal to the worker. Raises ProcessLookupError when there is none."""
        if self.worker.child is None:
            raise ProcessLookupError(self.name)
        self.worker.child.signal(number)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until `condition` holds; it is checked after every event."""
        while not condition():
            self._changed.clear()
            await self._changed.wait()

    def housekeep(self) -> None:
        """Once a second: rotate the logs, make deleted ones again, write a summary that the disk refused, and report
        missing samples when the sampler has stopped."""
        self.log.rotate_if_needed()
        self._summary_file.retry()
        if self.log.restore_if_deleted():
            text = f"Log files in {self.log.folder} were deleted during the run; made them again."
            self._notice(act.Notice("logs_deleted", text, act.Severity.WARNING))
        sample, child = self.machine.last_sample, self.worker.child
        if child is None:
            return
        now_s = time.monotonic()
        silent_s = now_s - max(child.started_s, 0.0 if sample is None else sample.at_s)
        if silent_s > SILENCE_S + self.settings.runs[self.name].memory.sample_interval_s:
            self.post(ev.SampleMissing(now_s, self.machine.history.generation, f"no sample for {silent_s:.0f} s"))

    def summary(self) -> dict[str, Any]:
        """The contents of `summary.json`. Generations that the journal can't return come from memory."""
        return summary_of(self.name, self.machine.history, self._recorder.generations())

    async def close(self) -> None:
        """Release everything. The run must be at rest."""
        self._timer.cancel()
        self._summary_file.retry(last=True)
        self._host.repeat(False)
        await self.worker.close()
        await self.recovery.close()
        self.log.close()

    # ---- events

    def post(self, event: ev.Event) -> None:
        """Give the machine an event, and carry out its actions."""
        self._events.append(event)
        if self._working:
            return
        self._working = True
        try:
            while self._events:
                self._handle(self._events.popleft())
            self._timer.schedule()
        except Exception as error:
            self._give_up(error)
        finally:
            self._working = False
        self._host.repeat(self.machine.state is State.WAITING)
        self._changed.set()

    def _post_worker(self, event: ev.Event) -> None:
        if isinstance(event, ev.Exited):
            self._host.poll()
        self.post(event)

    def _handle(self, event: ev.Event) -> None:
        for action in apply(self.machine, event):
            try:
                self._do(action)
            except (OSError, StateDirError, JournalError, wire.WireError) as error:
                self._failed(action, error)
        self._note(event)
        self._observers.show(lambda observer: observer.on_event(self.machine, event))

    def _failed(self, action: act.Action, error: Exception) -> None:
        name = _action_name(action)
        log.error("action_failed", run=self.name, action=name, error=str(error))
        self.unsaved = str(error) if isinstance(action, act.SaveHistory) else self.unsaved
        now_s = time.monotonic()
        reported = isinstance(action, act.Spawn)  # with what follows, by the machine
        if not reported and now_s - self._failure_notice_s.get(name, -math.inf) >= FAILURE_NOTICE_INTERVAL_S:
            self._failure_notice_s[name] = now_s
            text = f"{ACTION_TEXTS.get(name, name)} failed: {error}"
            notice = act.Notice("action_failed", text, act.Severity.ERROR)
            self._observers.show(lambda observer: observer.on_notice(notice))
        if isinstance(error, StateDirError):
            transient = getattr(error.__cause__, "errno", None) in STATE_DIR_ERRORS
        else:
            transient = isinstance(error, JournalError) or getattr(error, "errno", None) in TRANSIENT_ERRORS
        self._events.append(ev.ActionFailed(now_s, name, str(error), transient))

    def _give_up(self, error: Exception) -> None:
        """A bug in the supervisor: kill the worker, since its memory is no longer watched, and fail the run."""
        reason = f"bug in the supervisor: {type(error).__name__}: {error}"[:500]
        log.error("supervisor_bug", run=self.name, exc_info=error)
        self._broken = True
        self._events.clear()
        self.worker.cancel_start()
        if self.worker.child is not None:
            self.worker.child.kill()
        self.machine.state = State.FATAL
        self.machine.reason = self.machine.history.reason = reason
        self.machine.history.outcome, self.machine.history.unfinished = "failed", False
        generation = self.machine.current
        last: list[act.Action] = [act.Notice("bug", f"Failed: {reason}.", act.Severity.ERROR)]
        if generation is not None and self.worker.child is not None:
            record = generation.record(time.monotonic(), "killed", "bug in the supervisor")
            last.append(act.CloseGeneration(generation.generation, record))
        last += [act.SaveHistory(self.machine.history.snapshot()), act.Finish("failed", reason)]
        for action in last:
            try:
                self._do(action)
            except Exception as another:  # the bug may be in one of these
                log.error("action_failed", run=self.name, action=_action_name(action), error=repr(another))

    def _on_deadline(self) -> None:
        if self.machine.state is State.BACKOFF:
            self._host.poll()
        self.post(ev.Tick(time.monotonic()))

    def _note(self, event: ev.Event) -> None:
        if isinstance(event, ev.Sample):
            self._recorder.sample(event)
        elif isinstance(event, ev.Ready) and event.generation == self.machine.history.generation:
            self._recorder.save_history(act.SaveHistory(self.machine.snapshot(), wait=False))  # it has a new target
            keep_job(self.folder)
        elif isinstance(event, ev.StepReport) and event.generation == self.machine.history.generation:
            self._recorder.step(self.machine, event)
        elif isinstance(event, ev.DeviceFound) and event.generation == self.machine.history.generation:
            self._watch_device(event)
        elif isinstance(event, ev.Bye):
            self.worker.bye.set()

    def _watch_device(self, found: ev.DeviceFound) -> None:
        problem = self.worker.watch_device(found)
        if problem and problem != self._device_problem:
            text = f"Device memory is watched by the worker's reports only, not between updates: {problem}."
            self._notice(act.Notice("device_unwatched", text, act.Severity.WARNING, found.generation))
        self._device_problem = problem

    # ---- actions

    def _do(self, action: act.Action) -> None:
        match action:
            case act.Notice():
                self._notice(action)
            case act.SaveHistory():
                self._recorder.save_history(action)
                self.unsaved = "" if action.wait else self.unsaved
            case act.CloseGeneration():
                self._recorder.close_generation(action)
            case act.Spawn():
                self._spawn(action)
            case act.Finish():
                self.worker.stopped_wall_s = time.time()
                self._summary_file.write(self.summary())
            case act.RequestClearCache() | act.RequestAutopsy() | act.RequestStop() | act.RequestResize():
                self.worker.request(action)
            case act.DumpStacks() | act.Terminate() | act.Kill():
                self.worker.signal(action)
            case _:
                raise AssertionError(f"unhandled action: {action}")

    def _notice(self, notice: act.Notice) -> None:
        self._recorder.notice(notice)
        self._observers.show(lambda observer: observer.on_notice(notice))

    def _spawn(self, action: act.Spawn) -> None:
        self._broken = False
        self.machine.task_digest = task_digest(self.settings, self.name)
        batch = self.machine.batch
        past = Past(batch.requested, batch.requested_effective)
        self.worker.spawn(action, self.machine.policy.memory.limit_bytes, past)
        if self._first_notice is not None:
            self._notice(self._first_notice)
            self._first_notice = None
        drill = self.settings.runs[self.name].drill
        if drill != wire.DrillJob() and not self._drill_reported:
            self._drill_reported = True
            self._notice(act.Notice("drill", drill_text(drill), act.Severity.WARNING))


def _action_name(action: act.Action) -> str:
    return "spawn" if isinstance(action, act.Spawn) else type(action).__name__
