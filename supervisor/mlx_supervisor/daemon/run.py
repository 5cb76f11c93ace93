"""One run: its machine, and the adapters that carry out what the machine decides."""

import asyncio
import errno
import math
import time
import zlib
from collections import deque
from collections.abc import Callable, Sequence

import structlog

from mlx_supervisor import wire
from mlx_supervisor.core import actions as act
from mlx_supervisor.core import events as ev
from mlx_supervisor.core.machine.machine import apply
from mlx_supervisor.core.machine.run_state import Run
from mlx_supervisor.core.machine.states import AT_REST, State
from mlx_supervisor.daemon.deadline_timer import DeadlineTimer
from mlx_supervisor.daemon.recorder import Recorder
from mlx_supervisor.daemon.recovery import Recovery
from mlx_supervisor.daemon.shared import Observer, Observers, Shared
from mlx_supervisor.daemon.summary import summary_of, write_summary
from mlx_supervisor.daemon.worker_process import WorkerProcess, drill_text
from mlx_supervisor.journal.database import JournalError
from mlx_supervisor.logs.run_log import RunLog
from mlx_supervisor.process.launch import WORKER_VARIABLE as WORKER_VARIABLE
from mlx_supervisor.process.launch import worker_command as worker_command
from mlx_supervisor.sampling.host_poller import HostPoller
from mlx_supervisor.settings.schema import DrillSettings, Settings
from mlx_supervisor.settings.to_policy import policy_of
from mlx_supervisor.state_dir import StateDirError

COMPLAINT_INTERVAL_S = 60.0
PASSING_ERRORS = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EAGAIN, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO}
)
"""What may be otherwise in a minute; everything else that spoils a start is likely to stay."""
SILENCE_S = 5.0
"""Without any sample for so long, the sampler itself is suspect: every second of it counts as a missing sample."""
FAILED_WORDS = {
    "spawn": "Starting the worker",
    "SaveHistory": "Keeping the run's history in the journal",
    "CloseGeneration": "Noting the worker's end in the journal",
    "Finish": "Writing summary.json",
}

log = structlog.get_logger()


class SupervisedRun:
    """Events are dealt with one at a time, in order; an action that fails becomes the next event.

    Raises SettingsError, StateDirError or JournalError when the run can't even be set up.
    """

    def __init__(self, name: str, settings: Settings, shared: Shared, observers: Sequence[Observer] = ()) -> None:
        self.name = name
        self.settings = settings
        self._observers = Observers(name, observers)
        self._shared = shared
        self.folder = shared.state.run_dir(name)
        policy = policy_of(settings.runs[name], shared.machine_bytes, f"runs.{name}")
        (self.folder / "logs").mkdir(mode=0o700, exist_ok=True)
        self.log = RunLog(self.folder / "logs")
        self._recorder = Recorder(name, shared.journal, self.log)
        self.machine = Run(policy, self._recorder.load_history(), seed=zlib.crc32(name.encode()))
        self._events: deque[ev.Event] = deque()
        self._working = False
        self._broken = False
        self._complained_s: dict[str, float] = {}
        self._changed = asyncio.Event()
        self._drill_told = False
        self._host = HostPoller(self.post)
        self.worker = WorkerProcess(name, settings, shared, self.log, self._recorder, self._post_worker)
        self.recovery = Recovery(name, shared.journal, self.machine, self._notice, self.post, self._changed.set)
        self._timer = DeadlineTimer(name, self.machine.next_deadline, self._on_deadline)

    # ---- for the daemon

    @property
    def pid(self) -> int | None:
        """Of the living worker."""
        return None if self.worker.child is None else self.worker.child.pid

    @property
    def at_rest(self) -> bool:
        """No worker, and none to come."""
        return self.machine.state in AT_REST and not (self._broken and self.worker.child is not None)

    def command(self, kind: ev.CommandKind, reason: str = "") -> None:
        """What somebody asks of the run. While it is recovering only KILL does something: it ends the wait."""
        if self.recovery.active:
            if kind is ev.CommandKind.KILL:
                self.recovery.hurry()
            return
        if self.at_rest:
            self._host.poll()
        self.post(ev.Command(time.monotonic(), kind, reason))

    def signal(self, number: int) -> None:
        """Send a signal to the worker. Raises ProcessLookupError when there is none."""
        if self.worker.child is None:
            raise ProcessLookupError(self.name)
        self.worker.child.signal(number)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Until `condition` holds; it is looked at after every event."""
        while not condition():
            self._changed.clear()
            await self._changed.wait()

    def tend(self) -> None:
        """Once a second: keep the logs within their bounds, and notice a sampler that has fallen silent."""
        self.log.rotate_if_needed()
        sample, child = self.machine.last_sample, self.worker.child
        if child is None:
            return
        now_s = time.monotonic()
        silent_s = now_s - max(child.started_s, 0.0 if sample is None else sample.at_s)
        if silent_s > SILENCE_S + self.settings.runs[self.name].memory.sample_interval_s:
            self.post(ev.SampleMissing(now_s, self.machine.history.generation, f"no sample for {silent_s:.0f} s"))

    def summary(self) -> dict[str, object]:
        """As `summary.json` has it. Lives that the journal can't tell of are told from memory."""
        return summary_of(self.name, self.machine.history, self._recorder.lives())

    async def close(self) -> None:
        """After the run has come to rest."""
        self._timer.cancel()
        self._host.repeat(False)
        await self.worker.close()
        await self.recovery.close()
        self.log.close()

    # ---- events

    def post(self, event: ev.Event) -> None:
        """Give the machine an event, and do what it wants."""
        self._events.append(event)
        if self._working:
            return
        self._working = True
        try:
            while self._events:
                self._deal_with(self._events.popleft())
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

    def _deal_with(self, event: ev.Event) -> None:
        for action in apply(self.machine, event):
            try:
                self._do(action)
            except (OSError, StateDirError, JournalError, wire.WireError) as error:
                self._failed(action, error)
        self._note(event)
        self._observers.show(lambda observer: observer.on_event(self.machine, event))

    def _failed(self, action: act.Action, error: Exception) -> None:
        name = _action_name(action)
        log.error("an action failed", run=self.name, action=name, error=str(error))
        now_s = time.monotonic()
        if now_s - self._complained_s.get(name, -math.inf) >= COMPLAINT_INTERVAL_S:
            self._complained_s[name] = now_s
            text = f"{FAILED_WORDS.get(name, name)} failed: {error}"
            notice = act.Notice("action_failed", text, act.Severity.ERROR)
            self._observers.show(lambda observer: observer.on_notice(notice))
        passing = isinstance(error, JournalError) or getattr(error, "errno", None) in PASSING_ERRORS
        self._events.append(ev.ActionFailed(now_s, name, str(error), passing))

    def _give_up(self, error: Exception) -> None:
        """A bug of ours. A worker that nobody watches is worse than none: it is killed, and the run has failed."""
        reason = f"a bug of the supervisor: {type(error).__name__}: {error}"[:500]
        log.error(reason, run=self.name, exc_info=error)
        self._broken = True
        self._events.clear()
        if self.worker.child is not None:
            self.worker.child.kill()
        self.machine.state = State.FATAL
        self.machine.reason = self.machine.history.reason = reason
        self.machine.history.outcome, self.machine.history.wanted = "failed", False
        life = self.machine.current
        last: list[act.Action] = [act.Notice("bug", f"Failed: {reason}.", act.Severity.ERROR)]
        if life is not None and self.worker.child is not None:
            record = life.record(time.monotonic(), "killed", "a bug of the supervisor")
            last.append(act.CloseGeneration(life.generation, record))
        last += [act.SaveHistory(self.machine.history.snapshot()), act.Finish("failed", reason)]
        for action in last:
            try:
                self._do(action)
            except Exception as another:  # one of these may be what is broken
                log.error("an action failed", run=self.name, action=_action_name(action), error=repr(another))

    def _on_deadline(self) -> None:
        if self.machine.state is State.BACKOFF:
            self._host.poll()
        self.post(ev.Tick(time.monotonic()))

    def _note(self, event: ev.Event) -> None:
        if isinstance(event, ev.Sample):
            self._recorder.sample(event)
        elif isinstance(event, ev.StepReport) and event.generation == self.machine.history.generation:
            self._recorder.step(self.machine, event)
        elif isinstance(event, ev.Bye):
            self.worker.bye_received()

    # ---- actions

    def _do(self, action: act.Action) -> None:
        match action:
            case act.Notice():
                self._notice(action)
            case act.SaveHistory():
                self._recorder.save_history(action)
            case act.CloseGeneration():
                self._recorder.close_generation(action)
            case act.Spawn():
                self._spawn(action)
            case act.Finish():
                self.worker.stopped_wall_s = time.time()
                write_summary(self.folder, self.summary())
            case act.RequestClearCache() | act.RequestAutopsy() | act.RequestStop() | act.RequestResize():
                self.worker.request(action)
            case act.DumpStacks() | act.Terminate() | act.Kill():
                self.worker.signal(action)
            case _:
                raise AssertionError(f"nobody does {action}")

    def _notice(self, notice: act.Notice) -> None:
        self._recorder.notice(notice)
        self._observers.show(lambda observer: observer.on_notice(notice))

    def _spawn(self, action: act.Spawn) -> None:
        self._broken = False
        self.worker.spawn(action, self.machine.policy.memory.limit_bytes)
        drill = self.settings.runs[self.name].drill
        if drill != DrillSettings() and not self._drill_told:
            self._drill_told = True
            self._notice(act.Notice("drill", drill_text(drill), act.Severity.WARNING))


def _action_name(action: act.Action) -> str:
    if isinstance(action, act.Spawn):
        return "spawn"
    return type(action).__name__
