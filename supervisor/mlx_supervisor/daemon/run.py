"""One run: its machine, and the adapters that carry out what the machine decides."""

import asyncio
import errno
import math
import secrets
import time
import zlib
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

import structlog

from mlx_supervisor import wire
from mlx_supervisor.core import actions as act
from mlx_supervisor.core import events as ev
from mlx_supervisor.core.machine.machine import apply
from mlx_supervisor.core.machine.run_state import Run
from mlx_supervisor.core.machine.states import AT_REST, State
from mlx_supervisor.daemon.recorder import Ledger
from mlx_supervisor.daemon.recovery import end_left, recovered
from mlx_supervisor.daemon.step_line import drill_text
from mlx_supervisor.daemon.summary import summary_of, write_summary
from mlx_supervisor.host.caffeinate import Awake
from mlx_supervisor.journal.database import JournalError
from mlx_supervisor.journal.journal import Journal, OpenGeneration
from mlx_supervisor.logs.run_log import RunLog
from mlx_supervisor.process.child import Child, ExitStatus
from mlx_supervisor.process.launch import WORKER_VARIABLE as WORKER_VARIABLE
from mlx_supervisor.process.launch import worker_command as worker_command
from mlx_supervisor.process.launch import write_job
from mlx_supervisor.sampling.host_poller import Lookout
from mlx_supervisor.sampling.worker_sampler import Sampler
from mlx_supervisor.settings.schema import DrillSettings, Settings
from mlx_supervisor.settings.to_policy import policy_of
from mlx_supervisor.state_dir import StateDir, StateDirError
from mlx_supervisor.telemetry import Telemetry

BYE_WAIT_S = 0.5
"""How long the last frames of a worker that has exited may still be on their way."""
LATE_S = 1.0
"""A deadline noticed so late means that we were stopped, or stuck."""
CATCH_UP_S = 1.0
"""Then what the worker said meanwhile is heard first, for so long."""
COMPLAINT_INTERVAL_S = 60.0
PASSING_ERRORS = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EAGAIN, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO}
)
"""What may be otherwise in a minute; everything else that spoils a start is likely to stay."""
SILENCE_S = 5.0
"""Without any sample for so long, the sampler itself is suspect: every second of it counts as a missing sample."""
REQUESTS: dict[type[act.Action], type[wire.Message]] = {
    act.RequestClearCache: wire.ClearCache,
    act.RequestStop: wire.Stop,
    act.RequestAutopsy: wire.Autopsy,
    act.RequestResize: wire.Resize,
}
FAILED_WORDS = {
    "spawn": "Starting the worker",
    "SaveHistory": "Keeping the run's history in the journal",
    "CloseGeneration": "Noting the worker's end in the journal",
    "Finish": "Writing summary.json",
}

log = structlog.get_logger()


@dataclass(frozen=True)
class Shared:
    """What all runs of a daemon use together."""

    state: StateDir
    journal: Journal
    telemetry: Telemetry
    sampler: Sampler
    machine_bytes: int


class Observer:
    """Who wants to see a run live: a display. Called on the event loop."""

    def on_event(self, run: "SupervisedRun", event: ev.Event) -> None:
        """After the machine has dealt with it."""

    def on_notice(self, run: "SupervisedRun", notice: act.Persist) -> None:
        """Something worth a sentence happened."""


class SupervisedRun:
    """Events are dealt with one at a time, in order; an action that fails becomes the next event.

    Raises SettingsError, StateDirError or JournalError when the run can't even be set up.
    """

    def __init__(self, name: str, settings: Settings, shared: Shared, observers: Sequence[Observer] = ()) -> None:
        self.name = name
        self.settings = settings
        self.observers = list(observers)
        self._shared = shared
        self.folder = shared.state.run_dir(name)
        policy = policy_of(settings.runs[name], shared.machine_bytes, f"runs.{name}")
        (self.folder / "logs").mkdir(mode=0o700, exist_ok=True)
        self.log = RunLog(self.folder / "logs")
        self._ledger = Ledger(name, shared.journal, self.log)
        self.machine = Run(policy, self._ledger.load_history(), seed=zlib.crc32(name.encode()))
        self.started_wall_s = 0.0
        self.stopped_wall_s = 0.0
        self.exit_status: int | None = None
        self.recovering = False
        self._child: Child | None = None
        self._events: deque[ev.Event] = deque()
        self._working = False
        self._timer: asyncio.TimerHandle | None = None
        self._timer_s = math.inf
        self._forgiven_s: float | None = None
        self._catch_up_s = -math.inf
        self._hurried = False
        self._broken = False
        self._complained_s: dict[str, float] = {}
        self._changed = asyncio.Event()
        self._bye = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._stderr_offset = 0
        self._drill_told = False
        self._awake = Awake()
        self._lookout = Lookout(self.post)

    # ---- for the daemon

    @property
    def pid(self) -> int | None:
        """Of the living worker."""
        return None if self._child is None else self._child.pid

    @property
    def at_rest(self) -> bool:
        """No worker, and none to come."""
        return self.machine.state in AT_REST and not (self._broken and self._child is not None)

    def command(self, kind: ev.CommandKind, reason: str = "") -> None:
        """What somebody asks of the run. While it is recovering only KILL does something: it ends the wait."""
        if self.recovering:
            self._hurried |= kind is ev.CommandKind.KILL
            return
        if self.at_rest:
            self._lookout.look()
        self.post(ev.Command(time.monotonic(), kind, reason))

    def signal(self, number: int) -> None:
        """Send a signal to the worker. Raises ProcessLookupError when there is none."""
        if self._child is None:
            raise ProcessLookupError(self.name)
        self._child.signal(number)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Until `condition` holds; it is looked at after every event."""
        while not condition():
            self._changed.clear()
            await self._changed.wait()

    async def recover(self, lefts: Sequence[OpenGeneration]) -> None:
        """Make sure that no worker of a dead supervisor lives, and take note of how far it came."""
        self.recovering = True
        try:
            restart = self.machine.policy.restart
            grace_s = restart.stop_grace_s + restart.term_grace_s
            for left in lefts:
                if not await end_left(left, grace_s, lambda: self._hurried, self._notice):
                    self.machine.refuse_starts(left.generation)
                    self._keep(self._look_on(lefts))
                    return
            self._take_over(lefts)
        except Exception as error:  # the run can be started all the same: its last worker is gone, or was never there
            log.error("what a dead supervisor left can't be taken over", run=self.name, exc_info=error)
        finally:
            self.recovering = self._hurried = False
            self._changed.set()

    async def _look_on(self, lefts: Sequence[OpenGeneration]) -> None:
        """Somebody would not wait for a worker that can't be killed: until it is gone, starts are refused."""
        for left in lefts:
            await end_left(left, 0.0, lambda: False, lambda _: None)
        self._take_over(lefts)

    def _take_over(self, lefts: Sequence[OpenGeneration]) -> None:
        for left in lefts[:-1]:
            self._shared.journal.close_generation(self.name, left.generation, {"ended": "lost", "cause": "unknown"})
        self.post(recovered(lefts[-1], self._shared.journal, self.name))

    def _keep(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def tend(self) -> None:
        """Once a second: keep the logs within their bounds, and notice a sampler that has fallen silent."""
        self.log.rotate_if_needed()
        sample, child = self.machine.last_sample, self._child
        if child is None:
            return
        now_s = time.monotonic()
        silent_s = now_s - max(child.started_s, 0.0 if sample is None else sample.at_s)
        if silent_s > SILENCE_S + self.settings.runs[self.name].memory.sample_interval_s:
            self.post(ev.SampleMissing(now_s, self.machine.history.generation, f"no sample for {silent_s:.0f} s"))

    def summary(self) -> dict[str, object]:
        """As `summary.json` has it. Lives that the journal can't tell of are told from memory."""
        return summary_of(self.name, self.machine.history, self._ledger.lives())

    async def close(self) -> None:
        """After the run has come to rest."""
        if self._timer is not None:
            self._timer.cancel()
        self._lookout.keep(False)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
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
            self._schedule()
        except Exception as error:
            self._give_up(error)
        finally:
            self._working = False
        self._lookout.keep(self.machine.state is State.WAITING)
        self._changed.set()

    def _deal_with(self, event: ev.Event) -> None:
        for action in apply(self.machine, event):
            try:
                self._do(action)
            except (OSError, StateDirError, JournalError, wire.WireError) as error:
                self._failed(action, error)
        self._note(event)
        self._show(lambda observer: observer.on_event(self, event))

    def _failed(self, action: act.Action, error: Exception) -> None:
        name = _action_name(action)
        log.error("an action failed", run=self.name, action=name, error=str(error))
        now_s = time.monotonic()
        if now_s - self._complained_s.get(name, -math.inf) >= COMPLAINT_INTERVAL_S:
            self._complained_s[name] = now_s
            text = f"{FAILED_WORDS.get(name, name)} failed: {error}"
            self._show(lambda observer: observer.on_notice(self, act.Persist("action_failed", text, act.Level.ERROR)))
        passing = isinstance(error, JournalError) or getattr(error, "errno", None) in PASSING_ERRORS
        self._events.append(ev.ActionFailed(now_s, name, str(error), passing))

    def _show(self, show: Callable[[Observer], None]) -> None:
        """A display that fails is done without: the run matters more."""
        for observer in list(self.observers):
            try:
                show(observer)
            except Exception as error:
                self.observers.remove(observer)
                log.error("a display failed and is left out", run=self.name, error=repr(error))

    def _give_up(self, error: Exception) -> None:
        """A bug of ours. A worker that nobody watches is worse than none: it is killed, and the run has failed."""
        reason = f"a bug of the supervisor: {type(error).__name__}: {error}"[:500]
        log.error(reason, run=self.name, exc_info=error)
        self._broken = True
        self._events.clear()
        if self._child is not None:
            self._child.kill()
        self.machine.state = State.FATAL
        self.machine.reason = self.machine.history.reason = reason
        self.machine.history.outcome, self.machine.history.wanted = "failed", False
        life = self.machine.life
        last: list[act.Action] = [act.Persist("bug", f"Failed: {reason}.", act.Level.ERROR)]
        if life is not None and self._child is not None:
            record = life.record(time.monotonic(), "killed", "a bug of the supervisor")
            last.append(act.CloseGeneration(life.generation, record))
        last += [act.SaveHistory(self.machine.history.snapshot()), act.Finish("failed", reason)]
        for action in last:
            try:
                self._do(action)
            except Exception as another:  # one of these may be what is broken
                log.error("an action failed", run=self.name, action=_action_name(action), error=repr(another))

    def _schedule(self) -> None:
        """Have a Tick at the next deadline. A timer that comes too early does no harm: it sets the next one."""
        deadline_s = self.machine.next_deadline()
        if deadline_s is None:
            return
        at_s = max(deadline_s, self._catch_up_s)
        if self._timer_s <= at_s:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer_s = at_s
        self._timer = asyncio.get_running_loop().call_later(max(at_s - time.monotonic(), 0.0), self._tick)

    def _tick(self) -> None:
        due_s, self._timer, self._timer_s = self._timer_s, None, math.inf
        now_s, deadline_s = time.monotonic(), self.machine.next_deadline()
        if now_s - due_s > LATE_S and deadline_s != self._forgiven_s:
            self._forgiven_s, self._catch_up_s = deadline_s, now_s + CATCH_UP_S
            log.warning("the supervisor was stopped or stuck", run=self.name, late_s=round(now_s - due_s, 1))
            self._schedule()
            return
        if self.machine.state is State.BACKOFF:
            self._lookout.look()
        self.post(ev.Tick(time.monotonic()))

    def _note(self, event: ev.Event) -> None:
        if isinstance(event, ev.Sample):
            self._ledger.sample(event)
        elif isinstance(event, ev.StepReport) and event.generation == self.machine.history.generation:
            self._ledger.step(self.machine, event)
        elif isinstance(event, ev.Bye):
            self._bye.set()

    # ---- actions

    def _do(self, action: act.Action) -> None:
        match action:
            case act.Persist():
                self._notice(action)
            case act.SaveHistory():
                self._ledger.save_history(action)
            case act.CloseGeneration():
                self._ledger.close_generation(action)
            case act.Spawn():
                self._spawn(action)
            case act.Finish():
                self.stopped_wall_s = time.time()
                write_summary(self.folder, self.summary())
            case act.RequestClearCache() | act.RequestAutopsy() | act.RequestStop() | act.RequestResize():
                self._request(action)
            case act.DumpStacks() | act.Terminate() | act.Kill():
                self._signal(action)
            case _:
                raise AssertionError(f"nobody does {action}")

    def _notice(self, notice: act.Persist) -> None:
        self._ledger.notice(notice)
        self._show(lambda observer: observer.on_notice(self, notice))

    def _request(
        self, action: act.RequestClearCache | act.RequestAutopsy | act.RequestStop | act.RequestResize
    ) -> None:
        fields: dict[str, object] = {}
        if isinstance(action, act.RequestStop):
            fields = {"reason": action.reason[:500]}
        elif isinstance(action, act.RequestAutopsy):
            fields = {"limit_s": action.limit_s}
        elif isinstance(action, act.RequestResize):
            fields = {"batch_size": action.batch_size, "effective_batch": action.effective_batch}
        problem = self._shared.telemetry.send(self.name, REQUESTS[type(action)], **fields)
        if problem is not None:
            raise OSError(problem)

    def _signal(self, action: act.DumpStacks | act.Terminate | act.Kill) -> None:
        if self._child is None:
            return
        if isinstance(action, act.DumpStacks):
            self._child.dump_stacks()
        elif isinstance(action, act.Terminate):
            self._child.terminate()
        else:
            self._child.kill()

    def _spawn(self, action: act.Spawn) -> None:
        self._broken = False
        token = secrets.token_hex(16)
        limit_bytes = self.machine.policy.memory.limit_bytes
        telemetry = self._shared.telemetry.address
        job_file = write_job(self.settings, self.name, self.folder, telemetry, action, limit_bytes)
        self._stderr_offset = self.log.stderr_offset()
        self._bye.clear()
        self._ledger.open_generation(action, token, 0, 0.0)
        self._shared.telemetry.expect(self.name, action.generation, token)
        stdout, stderr = self.log.descriptors()
        child = Child.spawn([*worker_command(), str(job_file)], self.folder, token, stdout, stderr)
        self._child = child
        if (problem := self._awake.hold(child.pid)) is not None:
            log.warning(problem, run=self.name)
        self.started_wall_s = time.time()
        memory = self.machine.policy.memory
        interval_s = self.settings.runs[self.name].memory.sample_interval_s
        self._shared.sampler.watch(
            self.name, action.generation, child.pid, memory.limit_bytes, interval_s, child.brake, token
        )
        self._events.append(ev.Spawned(time.monotonic(), action.generation, child.pid))
        self._keep(self._wait(child, action.generation))
        try:
            self._ledger.open_generation(action, token, child.pid, child.create_time_s)
        except JournalError as error:  # its token is noted, which finds it too
            log.error("the journal can't note a worker's number", run=self.name, error=str(error))
        drill = self.settings.runs[self.name].drill
        if drill != DrillSettings() and not self._drill_told:
            self._drill_told = True
            self._notice(act.Persist("drill", drill_text(drill), act.Level.WARNING))

    async def _wait(self, child: Child, generation: int) -> None:
        try:
            status = await child.wait()
        except Exception as error:  # whatever it is, the run must not wait for this worker for ever
            log.error("a worker could not be waited for; it is killed", run=self.name, exc_info=error)
            child.kill()
            status = ExitStatus(None, None, None)
        self._shared.sampler.unwatch(self.name)
        if status.exit_code is not None and not self._bye.is_set():
            try:
                async with asyncio.timeout(BYE_WAIT_S):
                    await self._bye.wait()
            except TimeoutError:
                pass
        self._shared.telemetry.forget(self.name)
        self._awake.release()
        self._child = None
        self.stopped_wall_s = time.time()
        self.exit_status = _exit_number(status)
        self._lookout.look()
        tail = self.log.tail_since(self._stderr_offset, wire.STDERR_TAIL_LIMIT_BYTES)
        exited = ev.Exited(
            time.monotonic(), generation, status.exit_code, status.signal, tail, oom_killed=status.oom_killed
        )
        self.post(exited)


def _exit_number(status: ExitStatus) -> int:
    return -1 if status.exit_code is None else status.exit_code


def _action_name(action: act.Action) -> str:
    if isinstance(action, act.Spawn):
        return "spawn"
    return type(action).__name__
