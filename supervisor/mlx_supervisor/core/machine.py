"""One run as a state machine: events in, actions out, by the table in `table.py`."""

from mlx_supervisor.core import events as ev
from mlx_supervisor.core.actions import (
    CloseGeneration,
    Level,
    RequestClearCache,
    RequestResize,
)
from mlx_supervisor.core.breaker import BreakerState, Trip
from mlx_supervisor.core.causes import Cause
from mlx_supervisor.core.endings import Endings
from mlx_supervisor.core.events import CommandKind, Phase
from mlx_supervisor.core.history import Life
from mlx_supervisor.core.machine_base import REASON_LIMIT_CHARS, Ending
from mlx_supervisor.core.policy import MIB
from mlx_supervisor.core.table import S


class RunMachine(Endings):
    """One run. `apply` never raises for what the world does, only for our own bugs."""

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
        elif event.kind is not CommandKind.SUSPEND and self.history.generation > 0 and self.history.outcome == "":
            # a supervisor died in the middle of it, and now nobody wants it to go on
            self._finish(S.STOPPED, event.reason[:REASON_LIMIT_CHARS] or "stopped before it was started again")

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
        past.failures += event.machine_restarted  # a supervisor's death alone leaves the worker time to save
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
        self._budget.started()
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
        if event.action != "spawn" or self.life is None or self.life.pid is not None:
            return
        delay_s = self._budget.start_refused() if event.passing else None
        if delay_s is None:
            self._say("spawn_failed", f"The worker could not be started: {event.error}", Level.ERROR)
            self._after_life(event.at_s, Cause.SPAWN_FAILED, event.error, "not started")
            return
        text = f"The worker could not be started: {event.error}; tried again in {delay_s:.0f} s."
        self._say("spawn_failed", text, Level.ERROR)
        self._close_life(event.at_s, "not started", Cause.SPAWN_FAILED)
        self._go(S.BACKOFF, event.at_s + delay_s)

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
        trip = self.breaker.step(event, self.batch.at_minimum)
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
        self.breaker.phase(event.phase)
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
            self._save(wait=False)
            if self.state is S.DRAINING and not self._drain_extended:
                # one that was under way when the stop was asked for: the last one is still to be written
                self._drain_extended = True
                self._deadline_s = event.at_s + self.policy.restart.stop_grace_s
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
        return self.breaker.sample(event)

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
        self._kill(at_s, ending)  # first of all: words can wait, memory cannot
        self._say("trip", f"Hard trip: {trip.text}. The worker is killed.", Level.WARNING, hard=True)


def _why(event: ev.Command) -> str:
    return event.reason[:REASON_LIMIT_CHARS] or event.kind.value


def _asked(event: ev.Command) -> str:
    return f"{event.kind.value.capitalize()} asked for" + (
        f" ({event.reason[:REASON_LIMIT_CHARS]})" if event.reason else ""
    )
