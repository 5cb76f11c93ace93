"""A worker that runs: commands, updates, checkpoints, samples, trips, and what grew."""

from dataclasses import replace

from mlx_supervisor.core import events as ev
from mlx_supervisor.core.actions import (
    RequestAutopsy,
    RequestClearCache,
    RequestResize,
    Severity,
)
from mlx_supervisor.core.diagnosis.causes import Cause
from mlx_supervisor.core.events import CommandKind, Phase
from mlx_supervisor.core.machine.restarting import after_exit
from mlx_supervisor.core.machine.run_state import REASON_LIMIT_CHARS, Ending, Run
from mlx_supervisor.core.machine.starting import obeys
from mlx_supervisor.core.machine.states import S
from mlx_supervisor.core.memory.breaker import BreakerState, Trip
from mlx_supervisor.core.policy import MIB

FINDINGS_AT_MOST = 24
FINDING_LIMIT_CHARS = 300
AUTOPSY_GRACE_TIMES = 2
"""A worker that has to stop is asked what grew only where its grace is so many times as long as that may take."""


def on_command_before_ready(run: Run, event: ev.Command) -> None:
    if event.kind is not CommandKind.START:
        _end_on_command(run, event, run.policy.restart.term_grace_s)


def on_command_running(run: Run, event: ev.Command) -> None:
    if event.kind is CommandKind.KILL:
        _end_on_command(run, event, 0.0)
    elif event.kind is not CommandKind.START:
        ending = Ending(Cause.REQUESTED, _why(event), event.kind is CommandKind.RESTART)
        run.say(event.kind.value, f"{_request_text(event)}; the worker checkpoints and exits.")
        run.drain(event.at_s, ending)


def _end_on_command(run: Run, event: ev.Command, grace_s: float) -> None:
    ending = Ending(Cause.REQUESTED, _why(event), event.kind is CommandKind.RESTART)
    if event.kind is CommandKind.KILL:
        run.say("kill", f"{_request_text(event)}; the worker is killed.", Severity.WARNING)
        run.kill(event.at_s, ending)
    else:
        run.say(event.kind.value, f"{_request_text(event)}; the worker was not ready yet.")
        run.terminate(event.at_s, ending, grace_s)


def on_command_ending(run: Run, event: ev.Command) -> None:
    """What ends the life stays what it was; what comes after is another matter."""
    assert run.ending is not None
    if event.kind is CommandKind.KILL and run.state is not S.KILLING:
        run.say("kill", f"{_request_text(event)}; the worker is killed.", Severity.WARNING)
        run.kill(event.at_s, replace(run.ending, restart=False, requested_by=_request_text(event)))
    elif event.kind in (CommandKind.START, CommandKind.RESTART):
        run.ending = replace(run.ending, restart=True, requested_by="")
    else:
        run.ending = replace(run.ending, restart=False, requested_by=_request_text(event))


def on_step_unready(run: Run, event: ev.StepReport) -> None:
    """Telemetry may be lost, `Ready` too: a worker that makes steps is ready."""
    if obeys(run, event.at_s, event.batch_size):
        run.batch.adopt(event.batch_size, max(event.samples, event.batch_size))
        run.say("ready", f"Ready, as its step {event.step} tells: its own word was lost.", Severity.WARNING)
        run.go(S.RUNNING)
        run.heartbeat.progress(event.at_s, Phase.TRAIN, event.seconds)
        on_step_recorded(run, event)


def on_start_timeout(run: Run, event: ev.Tick) -> None:
    text = f"not ready after {run.policy.restart.start_timeout_s:.0f} s"
    run.say("start_timeout", f"The worker is {text}; it is stopped.", Severity.ERROR)
    ending = Ending(Cause.START_TIMEOUT, text, restart=True)
    run.terminate(event.at_s, ending, run.policy.restart.term_grace_s)


def on_spawn_failed(run: Run, event: ev.ActionFailed) -> None:
    if event.action != "spawn" or run.current is None or run.current.pid is not None:
        return
    delay_s = run.budget.start_refused() if event.passing else None
    if delay_s is None:
        run.say("spawn_failed", f"The worker could not be started: {event.error}", Severity.ERROR)
        after_exit(run, event.at_s, Ending(Cause.SPAWN_FAILED, event.error, restart=True), "not started")
        return
    run.reason = f"the worker could not be started: {event.error}; tried again in {delay_s:.0f} s"
    run.say("spawn_failed", f"{run.reason[0].upper()}{run.reason[1:]}.", Severity.ERROR)
    run.current.error = run.history.error = event.error
    run.close_generation(event.at_s, "not started", Cause.SPAWN_FAILED)
    run.go(S.BACKOFF, event.at_s + delay_s)


def on_step_recorded(run: Run, event: ev.StepReport) -> None:
    run.last_step = event
    run.history.add_step(event)
    if run.current is not None:
        run.current.add_step(event)


def on_step(run: Run, event: ev.StepReport) -> None:
    on_step_recorded(run, event)
    run.heartbeat.progress(event.at_s, Phase.TRAIN, event.seconds)
    if event.phase is not Phase.TRAIN:
        return
    was = run.breaker.state
    trip = run.breaker.step(event, run.batch.at_minimum)
    if trip is not None:
        _soft_trip(run, event.at_s, trip)
        return
    if run.breaker.leaking:
        _request_autopsy(run)
    if run.breaker.state is not was:
        run.say("breaker", f"The breaker is {run.breaker.state.value} again.")
    if run.breaker.state is BreakerState.CLOSED and not run.breaker.leaking:
        _grow(run)


def _grow(run: Run) -> None:
    larger = run.batch.good_step()
    if larger is not None:
        effective = run.batch.effective
        assert effective is not None
        run.say("grow", f"All well: {larger} samples at once from the next update.", batch_size=larger)
        run.save()
        run.out.append(RequestResize(run.history.generation, larger, effective))


def on_phase(run: Run, event: ev.PhaseChange) -> None:
    run.breaker.phase(event.phase)
    if run.state is S.RUNNING:
        run.heartbeat.progress(event.at_s, event.phase)


def on_checkpoint(run: Run, event: ev.CheckpointReport) -> None:
    run.history.stall_s += event.stall_s
    if run.state is S.RUNNING:
        run.heartbeat.checkpointed(event.at_s)
    if event.ok:
        run.history.durable_step = max(run.history.durable_step, event.step)
        run.breaker.checkpoint(event.seconds)
        text = f"Checkpoint of step {event.step}: {event.size_bytes / MIB:.1f} MiB in {event.seconds:.2f} s."
        run.say("checkpoint", text, step=event.step, seconds=event.seconds)
        run.save(wait=False)
        if run.state is S.DRAINING and not run.drain_extended:
            # one that was under way when the stop was asked for: the last one is still to be written
            run.drain_extended = True
            run.deadline_s = event.at_s + run.policy.restart.stop_grace_s
    else:
        text = f"No checkpoint of step {event.step}: {event.error}; the run goes on with the one before."
        run.say("checkpoint_failed", text, Severity.ERROR, step=event.step)


def on_bye(run: Run, event: ev.Bye) -> None:
    run.bye = event


def _observe_sample(run: Run, event: ev.Sample) -> Trip | None:
    run.missing = 0
    run.last_sample = event
    if run.current is not None:
        run.current.peak_footprint_bytes = max(run.current.peak_footprint_bytes, event.footprint_bytes)
    return run.breaker.sample(event)


def on_sample(run: Run, event: ev.Sample) -> None:
    trip = _observe_sample(run, event)
    if trip is not None:
        _hard_trip(run, event.at_s, trip)


def on_sample_relieving(run: Run, event: ev.Sample) -> None:
    trip = _observe_sample(run, event)
    if trip is not None:
        _hard_trip(run, event.at_s, trip)
    elif run.cleared and run.breaker.relieved(event.footprint_bytes):
        run.say("relieved", f"Clearing the caches made room: {event.footprint_bytes / MIB:,.0f} MiB.")
        run.relief = None
        run.heartbeat.progress(event.at_s, Phase.TRAIN)
        run.go(S.RUNNING)


def on_cleared(run: Run, _: ev.Cleared) -> None:
    run.cleared = True


def on_sample_missing(run: Run, event: ev.SampleMissing) -> None:
    run.missing += 1
    if run.missing < run.policy.memory.missing_samples:
        return
    text = f"{run.missing} samples in a row could not be had ({event.reason})"
    what = "the worker is restarted rather than left unwatched (memory.missing_samples)"
    run.say("blind", f"{text}; {what}.", Severity.ERROR)
    ending = Ending(Cause.BLIND, text, restart=True)
    if run.state is S.STARTING:
        run.terminate(event.at_s, ending, run.policy.restart.term_grace_s)
    else:
        run.drain(event.at_s, ending)


def _soft_trip(run: Run, at_s: float, trip: Trip) -> None:
    if trip.relievable and run.policy.memory.clear_first:
        text = f"Soft trip: {trip.text}. The caches are cleared first (memory.clear_first)."
        run.say("relief", text, Severity.WARNING)
        run.relief, run.cleared = trip, False
        run.out.append(RequestClearCache(run.history.generation))
        _request_autopsy(run)
        run.go(S.RELIEVING, at_s + run.policy.memory.relief_wait_s)
    else:
        _trip_and_drain(run, at_s, trip)


def on_no_relief(run: Run, event: ev.Tick) -> None:
    assert run.relief is not None
    _trip_and_drain(run, event.at_s, run.relief)


def _trip_and_drain(run: Run, at_s: float, trip: Trip) -> None:
    run.count_trip(trip)
    run.say("trip", f"Soft trip: {trip.text}. The worker checkpoints and exits.", Severity.WARNING, hard=False)
    if run.policy.restart.stop_grace_s >= AUTOPSY_GRACE_TIMES * run.policy.memory.autopsy_limit_s:
        _request_autopsy(run)  # before the stop: a worker that has heard that may not hear anything more
    run.drain(at_s, Ending(trip.cause, trip.text, restart=True))


def _hard_trip(run: Run, at_s: float, trip: Trip) -> None:
    ending = Ending(trip.cause, trip.text, restart=True)
    if run.ending is None:
        run.count_trip(trip)
    else:
        ending = run.ending
    run.kill(at_s, ending)  # first of all: words can wait, memory cannot
    run.say("trip", f"Hard trip: {trip.text}. The worker is killed.", Severity.WARNING, hard=True)


def _request_autopsy(run: Run) -> None:
    """Once a life."""
    memory = run.policy.memory
    if memory.autopsy and not run.autopsy_requested:
        run.autopsy_requested = run.autopsy_due = True
        run.heartbeat.pardon(memory.autopsy_limit_s)
        run.out.append(RequestAutopsy(run.history.generation, memory.autopsy_limit_s))


def on_autopsied(run: Run, event: ev.Autopsied) -> None:
    """One answer to one question: what comes unasked, or again, would drown all else in its sentences."""
    if not run.autopsy_due:
        return
    run.autopsy_due = False
    run.heartbeat.pardon(0.0)
    findings = [each[:FINDING_LIMIT_CHARS] for each in event.findings[:FINDINGS_AT_MOST]]
    when = f"at step {event.step}" if event.complete else f"at step {event.step}, cut short"
    for each in findings:
        run.say("autopsy", f"Autopsy, {when}: {each}", Severity.WARNING, step=event.step)
    if not findings:
        run.say("autopsy", f"Autopsy, {when}: nothing was found to have grown, in {event.seconds:.1f} s.")
    if run.current is not None:
        run.current.autopsy = findings
    run.history.autopsy = findings


def _why(event: ev.Command) -> str:
    return event.reason[:REASON_LIMIT_CHARS] or event.kind.value


def _request_text(event: ev.Command) -> str:
    return f"{event.kind.value.capitalize()} asked for" + (
        f" ({event.reason[:REASON_LIMIT_CHARS]})" if event.reason else ""
    )
