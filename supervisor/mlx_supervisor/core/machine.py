"""One run as a state machine: events in, actions out, by the table in `table.py`."""

from dataclasses import dataclass

from mlx_supervisor.core import events as ev
from mlx_supervisor.core.actions import (
    Action,
    CloseGeneration,
    DumpStacks,
    Field,
    Finish,
    Kill,
    Level,
    Persist,
    RequestClearCache,
    RequestResize,
    RequestStop,
    SaveHistory,
    Spawn,
    Terminate,
)
from mlx_supervisor.core.batch import BatchPlan
from mlx_supervisor.core.breaker import Breaker, BreakerState, Trip
from mlx_supervisor.core.causes import MEMORY_CAUSES, Cause, cause_of_exit, last_line
from mlx_supervisor.core.events import CommandKind, Outcome, Phase
from mlx_supervisor.core.heartbeat import Heartbeat
from mlx_supervisor.core.history import Life, RunHistory
from mlx_supervisor.core.policy import MIB, RunPolicy
from mlx_supervisor.core.restart import RestartBudget
from mlx_supervisor.core.table import AT_REST, TABLE, S, State

RESTED = {"completed": State.COMPLETED, "failed": State.FATAL}
"""Where a run stands whose history says how it ended."""
KILLS_AT_MOST = 3
DUMP_WAIT_S = 2.0
NEAR_SHARE = 0.85
"""Share of the limit above which a death that nobody explains is put down to memory."""
REASON_LIMIT_CHARS = 300


@dataclass(frozen=True, slots=True)
class Ending:
    """Why the present life is being ended, by us."""

    cause: Cause
    text: str
    restart: bool


class RunMachine:
    """One run. `apply` never raises for what the world does, only for our own bugs."""

    def __init__(self, policy: RunPolicy, history: RunHistory | None = None) -> None:
        self.policy = policy
        self.history = history or RunHistory()
        self.state = RESTED.get(self.history.outcome, State.STOPPED)
        self.breaker = Breaker(policy.memory, policy.restart.close_after_steps)
        self.life: Life | None = None
        self.last_sample: ev.Sample | None = None
        self.last_step: ev.StepReport | None = None
        self.reason = self.history.reason
        past = self.history
        past.forget_trips_below(policy.memory.limit_bytes)
        self.batch = BatchPlan(policy.batch, past.batch_size, frozenset(past.tripped_sizes))
        if past.asked_size is not None and past.asked_effective is not None:
            self.batch.adopt(past.asked_size, past.asked_effective)
        self._budget = RestartBudget(policy.restart, past.barren_lives)
        if past.breaker_open:
            self.breaker.open()
        self._heartbeat = Heartbeat(policy.restart.hang_timeout_s)
        self._deadline_s: float | None = None
        self._ending: Ending | None = None
        self._bye: ev.Bye | None = None
        self._relief: Trip | None = None
        self._cleared = False
        self._missing = 0
        self._kills = 0
        self._accounted_s: float | None = None
        self._survivor: int | None = None
        self._suspending = False
        self._out: list[Action] = []
        self._allowed: tuple[State, ...] = ()

    # ---- the interface

    def apply(self, event: ev.Event) -> list[Action]:
        """What is to be done about `event`."""
        self._out = []
        rule = TABLE[self.state].get(type(event))
        stale = isinstance(event, ev.WorkerEvent) and event.generation != self.history.generation
        if rule is None or stale or (isinstance(event, ev.Tick) and not self._due(event.at_s)):
            return []
        self._account(event.at_s)
        if isinstance(event, ev.Command):
            self._suspending = event.kind is CommandKind.SUSPEND
        handler, self._allowed = rule
        getattr(self, handler)(event)
        return self._out

    @property
    def stopping(self) -> bool:
        """Whether the present life is being ended for good, as somebody asked."""
        return self._ending is not None and not self._ending.restart

    def next_deadline(self) -> float | None:
        """When a `Tick` is wanted, in seconds of the events' clock; None when nothing is waited for."""
        if self.state is S.RUNNING:
            return self._heartbeat.deadline_s
        return self._deadline_s

    # ---- helpers

    def _due(self, at_s: float) -> bool:
        deadline_s = self.next_deadline()
        return deadline_s is not None and at_s >= deadline_s

    def _go(self, state: State, deadline_s: float | None = None) -> None:
        assert state in self._allowed, f"the table has no way from {self.state} to {state}"
        self.state = state
        self._deadline_s = deadline_s

    def _account(self, at_s: float) -> None:
        if self._accounted_s is not None and self.state not in AT_REST:
            self.history.active_s += max(at_s - self._accounted_s, 0.0)
        self._accounted_s = max(at_s, self._accounted_s or at_s)

    def _say(self, kind: str, text: str, level: Level = Level.INFO, **fields: Field) -> None:
        self._out.append(Persist(kind, text, level, self.history.generation, fields))

    def _save(self) -> None:
        past = self.history
        past.batch_size, past.asked_size = self.batch.size, self.batch.asked
        past.asked_effective = self.batch.asked_effective
        past.tripped_sizes = sorted(self.batch.tripped)
        past.barren_lives = self._budget.barren_lives
        past.breaker_open = self.breaker.state is not BreakerState.CLOSED
        past.reason = self.reason
        self._out.append(SaveHistory(past.snapshot()))

    def _spawn(self, at_s: float) -> None:
        past = self.history
        past.generation += 1
        past.wanted, past.outcome = True, ""
        past.durable_before = past.durable_step
        self.reason = ""
        self.breaker.begin_life()
        self._heartbeat = Heartbeat(self.policy.restart.hang_timeout_s)
        self.life = Life(past.generation, at_s, batch_size=self.batch.size, durable_before=past.durable_step)
        self.last_sample = self.last_step = self._ending = self._bye = self._relief = None
        self._missing = self._kills = 0
        self._go(S.STARTING, at_s + self.policy.restart.start_timeout_s)
        self._save()
        self._out.append(Spawn(past.generation, self.batch.size, self.batch.effective, past.tighter_steps))

    def _drain(self, at_s: float, ending: Ending) -> None:
        self._ending = ending
        self._out.append(RequestStop(self.history.generation, ending.text[:REASON_LIMIT_CHARS]))
        self._go(S.DRAINING, at_s + self.policy.restart.stop_grace_s)

    def _terminate(self, at_s: float, ending: Ending, grace_s: float) -> None:
        self._ending = ending
        self._out.append(Terminate(self.history.generation))
        self._go(S.TERMINATING, at_s + grace_s)

    def _kill(self, at_s: float, ending: Ending) -> None:
        self._ending = ending
        self._kills += 1
        self._out.append(Kill(self.history.generation, ending.text))
        self._go(S.KILLING, at_s + self.policy.restart.kill_wait_s)

    # ---- commands

    def _on_command_at_rest(self, event: ev.Command) -> None:
        if event.kind in (CommandKind.START, CommandKind.RESTART):
            if self._survivor is not None:
                text = f"Not started: a process of generation {self._survivor} is still there, unkillable."
                self._say("start_refused", text, Level.ERROR)
                return
            if not self.history.wanted:
                self._budget.barren_lives = 0
            self._say("start", "Starting.", batch_size=self.batch.size)
            self._spawn(event.at_s)

    def _on_survivor_gone(self, event: ev.Exited) -> None:
        if self._survivor is not None:
            self._say("survivor_gone", f"The unkillable process of generation {self._survivor} is gone.")
            self._survivor = None

    def _on_command_in_backoff(self, event: ev.Command) -> None:
        if event.kind in (CommandKind.START, CommandKind.RESTART):
            self._spawn(event.at_s)
        else:
            self._go(S.STOPPED)
            self._finish(S.STOPPED, event.reason[:REASON_LIMIT_CHARS] or "stopped while waiting to restart")

    def _on_command_before_ready(self, event: ev.Command) -> None:
        if event.kind is not CommandKind.START:
            self._end_on_command(event, self.policy.restart.term_grace_s)

    def _on_command_running(self, event: ev.Command) -> None:
        if event.kind is CommandKind.KILL:
            self._end_on_command(event, 0.0)
        elif event.kind is not CommandKind.START:
            ending = Ending(Cause.ASKED, _why(event), event.kind is CommandKind.RESTART)
            self._say(event.kind.value, f"{_asked(event)}; the worker checkpoints and exits.")
            self._drain(event.at_s, ending)

    def _end_on_command(self, event: ev.Command, grace_s: float) -> None:
        ending = Ending(Cause.ASKED, _why(event), event.kind is CommandKind.RESTART)
        if event.kind is CommandKind.KILL:
            self._say("kill", f"{_asked(event)}; the worker is killed.", Level.WARNING)
            self._kill(event.at_s, ending)
        else:
            self._say(event.kind.value, f"{_asked(event)}; the worker was not ready yet.")
            self._terminate(event.at_s, ending, grace_s)

    def _on_command_ending(self, event: ev.Command) -> None:
        assert self._ending is not None
        if event.kind is CommandKind.KILL and self.state is not S.KILLING:
            self._say("kill", f"{_asked(event)}; the worker is killed.", Level.WARNING)
            self._kill(event.at_s, Ending(self._ending.cause, _asked(event), restart=False))
        elif event.kind is CommandKind.START:
            self._ending = Ending(self._ending.cause, self._ending.text, restart=True)
        else:
            restart = event.kind is CommandKind.RESTART
            self._ending = Ending(self._ending.cause, self._ending.text if restart else _asked(event), restart)

    def _on_recovered(self, event: ev.Recovered) -> None:
        past = self.history
        past.add_lost_life(event)
        cause = Cause.HOST_LOST if event.machine_restarted else Cause.SUPERVISOR_LOST
        self._say("recovered", f"Took over generation {event.generation}: {cause.value}.", Level.WARNING)
        life = Life.recovered(event, self.batch.size)
        self._out.append(CloseGeneration(event.generation, life.record(event.at_s, "lost", cause.value)))
        progress = past.durable_step > past.durable_before
        if event.machine_restarted and not self._budget.life_ended(progress=progress, shrunk=False):
            self._go(S.FATAL)
            self._finish(
                S.FATAL, f"{self._budget.barren_lives} lives in a row saved nothing new; the last: {cause.value}"
            )
            return
        self._save()

    # ---- a worker starts

    def _on_spawned(self, event: ev.Spawned) -> None:
        if self.life is not None:
            self.life.pid = event.pid

    def _on_ready(self, event: ev.Ready) -> None:
        self.history.target_steps = event.target_steps
        self.history.durable_step = max(self.history.durable_step, event.step)
        self.history.highest_step = max(self.history.highest_step, event.step)
        for each in event.passed_over:
            self._say("checkpoint_passed_over", f"Checkpoint passed over: {each}", Level.WARNING)
        for each in event.notes:
            self._say("note", each)
        if not self._obeys(event.at_s, event.batch_size):
            return
        self.batch.adopt(event.batch_size, event.effective_batch)
        origin = f"from {event.checkpoint}" if event.checkpoint else "from the beginning"
        text = (
            f"Ready at step {event.step} of {event.target_steps}, {origin}; "
            f"{event.batch_size} samples at once, {event.effective_batch} an update."
        )
        self._say("ready", text, step=event.step, target_steps=event.target_steps, batch_size=event.batch_size)
        self._heartbeat.progress(event.at_s, Phase.TRAIN)
        self._go(S.RUNNING)

    def _obeys(self, at_s: float, batch_size: int) -> bool:
        ordered = self.batch.size
        if ordered is None or batch_size == ordered:
            return True
        text = f"the worker holds {batch_size} samples at once, {ordered} were ordered"
        self._say("batch_mismatch", f"Bug: {text}.", Level.ERROR)
        self._kill(at_s, Ending(Cause.REFUSED, text, restart=False))
        return False

    def _on_step_unready(self, event: ev.StepReport) -> None:
        """Telemetry may be lost, `Ready` too: a worker that makes steps is ready."""
        if self._obeys(event.at_s, event.batch_size):
            self.batch.adopt(event.batch_size, max(event.samples, event.batch_size))
            self._say("ready", f"Ready, as its step {event.step} tells: its own word was lost.", Level.WARNING)
            self._go(S.RUNNING)
            self._heartbeat.progress(event.at_s, Phase.TRAIN, event.seconds)
            self._on_step_recorded(event)

    def _on_start_timeout(self, event: ev.Tick) -> None:
        text = f"not ready after {self.policy.restart.start_timeout_s:.0f} s"
        self._say("start_timeout", f"The worker is {text}; it is stopped.", Level.ERROR)
        ending = Ending(Cause.START_TIMEOUT, text, restart=True)
        self._terminate(event.at_s, ending, self.policy.restart.term_grace_s)

    def _on_spawn_failed(self, event: ev.ActionFailed) -> None:
        if event.action == "spawn" and self.life is not None and self.life.pid is None:
            self._say("spawn_failed", f"The worker could not be started: {event.error}", Level.ERROR)
            self._after_life(event.at_s, Cause.SPAWN_FAILED, event.error, "not started")

    # ---- a worker runs

    def _on_step_recorded(self, event: ev.StepReport) -> None:
        self.last_step = event
        self.history.add_step(event)
        if self.life is not None:
            self.life.add_step(event)

    def _on_step(self, event: ev.StepReport) -> None:
        self._on_step_recorded(event)
        self._heartbeat.progress(event.at_s, Phase.TRAIN, event.seconds)
        if event.phase is not Phase.TRAIN:
            return
        was = self.breaker.state
        trip = self.breaker.step(event.step, event.seconds, event.cache_bytes, self.batch.at_minimum)
        if trip is not None:
            self._soft_trip(event.at_s, trip)
            return
        if self.breaker.state is not was:
            self._say("breaker", f"The breaker is {self.breaker.state.value} again.")
        if self.breaker.state is BreakerState.CLOSED and not self.breaker.leaking:
            self._grow()

    def _grow(self) -> None:
        larger = self.batch.good_step()
        if larger is not None:
            effective = self.batch.effective
            assert effective is not None
            self._say("grow", f"All well: {larger} samples at once from the next update.", batch_size=larger)
            self._save()
            self._out.append(RequestResize(self.history.generation, larger, effective))

    def _on_phase(self, event: ev.PhaseChange) -> None:
        if self.state is S.RUNNING:
            self._heartbeat.progress(event.at_s, event.phase)

    def _on_checkpoint(self, event: ev.CheckpointReport) -> None:
        self.history.stall_s += event.stall_s
        if self.state is S.RUNNING:
            self._heartbeat.checkpointed(event.at_s)
        if event.ok:
            self.history.durable_step = max(self.history.durable_step, event.step)
            self.breaker.checkpoint(event.seconds)
            text = f"Checkpoint of step {event.step}: {event.size_bytes / MIB:.1f} MiB in {event.seconds:.2f} s."
            self._say("checkpoint", text, step=event.step, seconds=event.seconds)
            self._save()
        else:
            text = f"No checkpoint of step {event.step}: {event.error}; the run goes on with the one before."
            self._say("checkpoint_failed", text, Level.ERROR, step=event.step)

    def _on_bye(self, event: ev.Bye) -> None:
        self._bye = event

    # ---- memory

    def _observe_sample(self, event: ev.Sample) -> Trip | None:
        self._missing = 0
        self.last_sample = event
        if self.life is not None:
            self.life.peak_footprint_bytes = max(self.life.peak_footprint_bytes, event.footprint_bytes)
        return self.breaker.sample(event.footprint_bytes)

    def _on_sample(self, event: ev.Sample) -> None:
        trip = self._observe_sample(event)
        if trip is not None:
            self._hard_trip(event.at_s, trip)

    def _on_sample_relieving(self, event: ev.Sample) -> None:
        trip = self._observe_sample(event)
        if trip is not None:
            self._hard_trip(event.at_s, trip)
        elif self._cleared and self.breaker.relieved(event.footprint_bytes):
            self._say("relieved", f"Clearing the caches made room: {event.footprint_bytes / MIB:,.0f} MiB.")
            self._relief = None
            self._heartbeat.progress(event.at_s, Phase.TRAIN)
            self._go(S.RUNNING)

    def _on_cleared(self, _: ev.Cleared) -> None:
        self._cleared = True

    def _on_sample_missing(self, event: ev.SampleMissing) -> None:
        self._missing += 1
        if self._missing < self.policy.memory.missing_samples:
            return
        text = f"{self._missing} samples in a row could not be had ({event.reason})"
        self._say("blind", f"{text}; the worker is restarted rather than left unwatched.", Level.ERROR)
        ending = Ending(Cause.BLIND, text, restart=True)
        if self.state is S.STARTING:
            self._terminate(event.at_s, ending, self.policy.restart.term_grace_s)
        else:
            self._drain(event.at_s, ending)

    def _soft_trip(self, at_s: float, trip: Trip) -> None:
        if trip.relievable:
            self._say("relief", f"Soft trip: {trip.text}. The caches are cleared first.", Level.WARNING)
            self._relief, self._cleared = trip, False
            self._out.append(RequestClearCache(self.history.generation))
            self._go(S.RELIEVING, at_s + self.policy.memory.relief_wait_s)
        else:
            self._trip_and_drain(at_s, trip)

    def _on_no_relief(self, event: ev.Tick) -> None:
        assert self._relief is not None
        self._trip_and_drain(event.at_s, self._relief)

    def _trip_and_drain(self, at_s: float, trip: Trip) -> None:
        self._count_trip(trip)
        self._say("trip", f"Soft trip: {trip.text}. The worker checkpoints and exits.", Level.WARNING, hard=False)
        self._drain(at_s, Ending(trip.cause, trip.text, restart=True))

    def _hard_trip(self, at_s: float, trip: Trip) -> None:
        ending = Ending(trip.cause, trip.text, restart=True)
        if self._ending is None:
            self._count_trip(trip)
        else:
            ending = self._ending
        self._say("trip", f"Hard trip: {trip.text}. The worker is killed.", Level.WARNING, hard=True)
        self._kill(at_s, ending)

    def _count_trip(self, trip: Trip) -> None:
        self.history.trips += 1
        self.breaker.open()

    # ---- a worker is being ended

    def _on_hang(self, event: ev.Tick) -> None:
        text = f"no progress for {self._heartbeat.allowance_s:.0f} s"
        self._say("hang", f"Hang: {text}. Its stacks go to its stderr; then it is killed.", Level.ERROR)
        self._out.append(DumpStacks(self.history.generation))
        self._terminate(event.at_s, Ending(Cause.HANG, text, restart=True), DUMP_WAIT_S)

    def _on_drain_timeout(self, event: ev.Tick) -> None:
        assert self._ending is not None
        text = f"The worker did not exit in {self.policy.restart.stop_grace_s:.0f} s; it gets SIGTERM."
        self._say("term", text, Level.WARNING)
        self._terminate(event.at_s, self._ending, self.policy.restart.term_grace_s)

    def _on_request_failed(self, event: ev.ActionFailed) -> None:
        """The worker can't be asked: it hears SIGTERM all the same."""
        if event.action not in ("RequestStop", "RequestClearCache"):
            return
        ending = self._ending or self._unheard_trip()
        self._say("unheard", f"The worker could not be asked to stop ({event.error}); it gets SIGTERM.", Level.WARNING)
        self._terminate(event.at_s, ending, self.policy.restart.stop_grace_s)

    def _unheard_trip(self) -> Ending:
        assert self._relief is not None
        self._count_trip(self._relief)
        return Ending(self._relief.cause, self._relief.text, restart=True)

    def _on_term_timeout(self, event: ev.Tick) -> None:
        assert self._ending is not None
        self._say("kill", "The worker did not heed SIGTERM; its process group is killed.", Level.WARNING)
        self._kill(event.at_s, self._ending)

    def _on_kill_timeout(self, event: ev.Tick) -> None:
        assert self._ending is not None
        if self._kills < KILLS_AT_MOST:
            self._say("kill", "The process group is still there; it is killed again.", Level.ERROR)
            self._kills += 1
            self._out.append(Kill(self.history.generation, self._ending.text))
            self._deadline_s = event.at_s + self.policy.restart.kill_wait_s
            return
        text = (
            f"a process of generation {self.history.generation} survived {self._kills} SIGKILLs; "
            f"the machine has to be restarted"
        )
        self._close_life(event.at_s, "not killable", self._ending.cause)
        self._survivor = self.history.generation
        self._go(S.FATAL)
        self._finish(S.FATAL, text)

    # ---- a life is over

    def _on_exited(self, event: ev.Exited) -> None:
        ended = _ended(event)
        if event.exit_code == 0 and self._all_done():
            self._completed(event.at_s, ended)
            return
        ending = self._ending
        if ending is None:
            ending = self._unasked_ending(event)
        self._after_life(event.at_s, ending.cause, ending.text, ended, ending.restart)

    def _all_done(self) -> bool:
        """An exit status of 0 alone proves nothing: code of the user's may have called `sys.exit`."""
        past = self.history
        if self._bye is not None:
            return self._bye.outcome is Outcome.COMPLETED
        return max(past.highest_step, past.durable_step) >= past.target_steps > 0

    def _unasked_ending(self, event: ev.Exited) -> Ending:
        if event.exit_code == 0:
            return Ending(Cause.CRASH, "it exited as if all was done, before the last step", restart=True)
        said = self._bye.reason if self._bye else last_line(event.stderr_tail)
        if event.exit_code == EXIT_REFUSED_CODE:
            return Ending(Cause.REFUSED, said.removeprefix("refused: ") or "no reason given", restart=False)
        if event.exit_code == EXIT_STOPPED_CODE:
            return Ending(Cause.INTERRUPTED, "somebody else told the worker to stop", restart=True)
        near = self._near_limit()
        cause = cause_of_exit(
            event.exit_code, event.signal, event.stderr_tail, oom_killed=event.oom_killed, near_limit=near
        )
        if cause in MEMORY_CAUSES:
            self.history.trips += 1
            self.breaker.open()
        return Ending(cause, said or _ended(event), restart=True)

    def _near_limit(self) -> bool:
        sample = self.last_sample
        return sample is not None and sample.footprint_bytes > NEAR_SHARE * self.policy.memory.limit_bytes

    def _completed(self, at_s: float, ended: str) -> None:
        self._close_life(at_s, ended, Cause.COMPLETED)
        if self._bye is not None:
            self.history.weights_sha256 = self._bye.weights_sha256
            self.history.highest_step = max(self.history.highest_step, self._bye.step)
        self._go(S.COMPLETED)
        self._finish(S.COMPLETED, "all steps done")

    def _after_life(self, at_s: float, cause: Cause, text: str, ended: str, restart: bool = True) -> None:
        """Name the cause, decide what changes, and whether there is another life."""
        life, past = self.life, self.history
        assert life is not None
        if self._bye is not None:
            past.weights_sha256 = self._bye.weights_sha256
        saved = past.durable_step > life.durable_before
        progress = saved and cause is not Cause.BLIND
        self._close_life(at_s, ended, cause)
        size = self.batch.size
        shrunk = cause in MEMORY_CAUSES and self.batch.halve(for_pressure=cause is not Cause.LEAK)
        if not restart:
            self._come_to_rest(cause, text)
            return
        hopeless = self._hopeless(cause, shrunk)
        if hopeless is not None:
            self._go(S.FATAL)
            self._finish(S.FATAL, hopeless)
            return
        past.tighter_steps = self._tighter(life, saved)
        if cause is Cause.ASKED:
            self._budget.barren_lives = 0
        elif not self._budget.life_ended(progress=progress, shrunk=shrunk):
            self._go(S.FATAL)
            self._finish(S.FATAL, f"{self._budget.barren_lives} lives in a row saved nothing new; the last: {text}")
            return
        what = f"The worker ended ({ended}): {cause.value}"
        change = f"; the batch goes from {size} to {self.batch.size}" if shrunk else ""
        delay_s = self._budget.delay_s(cause, dealt_with=shrunk or progress)
        wait = f"; next start in {delay_s:.0f} s" if delay_s else "; it is started again"
        self._say("restart", f"{what}{change}{wait}.", Level.WARNING, cause=cause.value, batch_size=self.batch.size)
        if delay_s:
            self._go(S.BACKOFF, at_s + delay_s)
            self._save()
        else:
            self._spawn(at_s)

    def _hopeless(self, cause: Cause, shrunk: bool) -> str | None:
        """A limit that the very first steps can't keep: say so at once instead of trying again and again."""
        if cause not in MEMORY_CAUSES or self.history.highest_step > 0 or self.life is None:
            return None
        before_ready = self.history.target_steps == 0
        by_our_limit = self.life.peak_footprint_bytes > NEAR_SHARE * self.policy.memory.limit_bytes
        if (shrunk and not before_ready) or not by_our_limit:
            return None
        peak = self.life.peak_footprint_bytes / MIB
        limit = self.policy.memory.limit_bytes / MIB
        where = "before the model was loaded" if before_ready else f"before the first step at batch {self.batch.size}"
        return (
            f"the limit of {limit:,.0f} MiB is below what this run needs: it reached {peak:,.0f} MiB {where}; "
            f"raise memory.limit or choose a smaller model"
        )

    def _tighter(self, life: Life, saved: bool) -> int | None:
        """A life that ended before its first checkpoint: let the next one save sooner."""
        if saved or life.first_step is None or life.last_step is None:
            return self.history.tighter_steps
        half = max(1, (life.last_step - life.first_step + 1) // 2)
        return min(half, self.history.tighter_steps or half)

    def _close_life(self, at_s: float, ended: str, cause: Cause) -> None:
        if self.life is not None:
            record = self.life.record(at_s, ended, cause.value)
            self._out.append(CloseGeneration(self.life.generation, record))

    def _come_to_rest(self, cause: Cause, text: str) -> None:
        state = S.FATAL if cause is Cause.REFUSED else S.STOPPED
        self._go(state)
        self._finish(state, text)

    def _finish(self, state: State, reason: str) -> None:
        outcome = {S.COMPLETED: "completed", S.STOPPED: "stopped", S.FATAL: "failed"}[state]
        self.history.outcome = outcome
        self.history.wanted = self._suspending and state is S.STOPPED
        self.reason = reason
        level = Level.ERROR if state is S.FATAL else Level.INFO
        self._say("finish", f"{outcome.capitalize()} at step {self.history.highest_step}: {reason}.", level)
        self._save()
        self._out.append(Finish(outcome, reason))

    def _on_backoff_over(self, event: ev.Tick) -> None:
        self._spawn(event.at_s)


EXIT_STOPPED_CODE = 75
EXIT_REFUSED_CODE = 78


def _why(event: ev.Command) -> str:
    return event.reason[:REASON_LIMIT_CHARS] or event.kind.value


def _asked(event: ev.Command) -> str:
    return f"{event.kind.value.capitalize()} asked for" + (
        f" ({event.reason[:REASON_LIMIT_CHARS]})" if event.reason else ""
    )


def _ended(event: ev.Exited) -> str:
    if event.signal is not None:
        return f"signal {event.signal}"
    if event.exit_code is None:
        return "gone"
    return f"exit code {event.exit_code}"
