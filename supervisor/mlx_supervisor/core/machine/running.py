"""One run as a state machine: events in, actions out, by the table in `table.py`."""

from dataclasses import replace

from mlx_supervisor.core import events as ev
from mlx_supervisor.core.actions import (
    Level,
    RequestAutopsy,
    RequestClearCache,
    RequestResize,
)
from mlx_supervisor.core.diagnosis.causes import Cause
from mlx_supervisor.core.events import CommandKind, Phase
from mlx_supervisor.core.machine.run_state import REASON_LIMIT_CHARS, Ending
from mlx_supervisor.core.machine.states import S
from mlx_supervisor.core.machine.stopping import Endings
from mlx_supervisor.core.memory.breaker import BreakerState, Trip
from mlx_supervisor.core.policy import MIB

FINDINGS_AT_MOST = 24
FINDING_LIMIT_CHARS = 300
AUTOPSY_GRACE_TIMES = 2
"""A worker that has to stop is asked what grew only where its grace is so many times as long as that may take."""


class RunMachine(Endings):
    """One run. `apply` never raises for what the world does, only for our own bugs."""

    # ---- commands

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
        """What ends the life stays what it was; what comes after is another matter."""
        assert self._ending is not None
        if event.kind is CommandKind.KILL and self.state is not S.KILLING:
            self._say("kill", f"{_asked(event)}; the worker is killed.", Level.WARNING)
            self._kill(event.at_s, replace(self._ending, restart=False, asked=_asked(event)))
        elif event.kind in (CommandKind.START, CommandKind.RESTART):
            self._ending = replace(self._ending, restart=True, asked="")
        else:
            self._ending = replace(self._ending, restart=False, asked=_asked(event))

    # ---- a worker starts

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
            self._after_life(event.at_s, Ending(Cause.SPAWN_FAILED, event.error, restart=True), "not started")
            return
        self.reason = f"the worker could not be started: {event.error}; tried again in {delay_s:.0f} s"
        self._say("spawn_failed", f"{self.reason[0].upper()}{self.reason[1:]}.", Level.ERROR)
        self.life.error = self.history.error = event.error
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
        if self.breaker.leaking:
            self._ask_for_autopsy()
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
        what = "the worker is restarted rather than left unwatched (memory.missing_samples)"
        self._say("blind", f"{text}; {what}.", Level.ERROR)
        ending = Ending(Cause.BLIND, text, restart=True)
        if self.state is S.STARTING:
            self._terminate(event.at_s, ending, self.policy.restart.term_grace_s)
        else:
            self._drain(event.at_s, ending)

    def _soft_trip(self, at_s: float, trip: Trip) -> None:
        if trip.relievable and self.policy.memory.clear_first:
            text = f"Soft trip: {trip.text}. The caches are cleared first (memory.clear_first)."
            self._say("relief", text, Level.WARNING)
            self._relief, self._cleared = trip, False
            self._out.append(RequestClearCache(self.history.generation))
            self._ask_for_autopsy()
            self._go(S.RELIEVING, at_s + self.policy.memory.relief_wait_s)
        else:
            self._trip_and_drain(at_s, trip)

    def _on_no_relief(self, event: ev.Tick) -> None:
        assert self._relief is not None
        self._trip_and_drain(event.at_s, self._relief)

    def _trip_and_drain(self, at_s: float, trip: Trip) -> None:
        self._count_trip(trip)
        self._say("trip", f"Soft trip: {trip.text}. The worker checkpoints and exits.", Level.WARNING, hard=False)
        if self.policy.restart.stop_grace_s >= AUTOPSY_GRACE_TIMES * self.policy.memory.autopsy_limit_s:
            self._ask_for_autopsy()  # before the stop: a worker that has heard that may not hear anything more
        self._drain(at_s, Ending(trip.cause, trip.text, restart=True))

    def _hard_trip(self, at_s: float, trip: Trip) -> None:
        ending = Ending(trip.cause, trip.text, restart=True)
        if self._ending is None:
            self._count_trip(trip)
        else:
            ending = self._ending
        self._kill(at_s, ending)  # first of all: words can wait, memory cannot
        self._say("trip", f"Hard trip: {trip.text}. The worker is killed.", Level.WARNING, hard=True)

    # ---- what grew

    def _ask_for_autopsy(self) -> None:
        """Once a life."""
        memory = self.policy.memory
        if memory.autopsy and not self._autopsy_asked:
            self._autopsy_asked = self._autopsy_due = True
            self._heartbeat.pardon(memory.autopsy_limit_s)
            self._out.append(RequestAutopsy(self.history.generation, memory.autopsy_limit_s))

    def _on_autopsied(self, event: ev.Autopsied) -> None:
        """One answer to one question: what comes unasked, or again, would drown all else in its sentences."""
        if not self._autopsy_due:
            return
        self._autopsy_due = False
        self._heartbeat.pardon(0.0)
        findings = [each[:FINDING_LIMIT_CHARS] for each in event.findings[:FINDINGS_AT_MOST]]
        when = f"at step {event.step}" if event.complete else f"at step {event.step}, cut short"
        for each in findings:
            self._say("autopsy", f"Autopsy, {when}: {each}", Level.WARNING, step=event.step)
        if not findings:
            self._say("autopsy", f"Autopsy, {when}: nothing was found to have grown, in {event.seconds:.1f} s.")
        if self.life is not None:
            self.life.autopsy = findings
        self.history.autopsy = findings


def _why(event: ev.Command) -> str:
    return event.reason[:REASON_LIMIT_CHARS] or event.kind.value


def _asked(event: ev.Command) -> str:
    return f"{event.kind.value.capitalize()} asked for" + (
        f" ({event.reason[:REASON_LIMIT_CHARS]})" if event.reason else ""
    )
