"""A running worker: commands, updates, checkpoints, memory samples, trips and autopsies."""

from dataclasses import replace
from math import isfinite

from mlx_supervisor.core import events as ev
from mlx_supervisor.core.actions import RequestAutopsy, RequestClearCache, RequestResize, RequestStop, Severity
from mlx_supervisor.core.diagnosis.autopsy import headline
from mlx_supervisor.core.diagnosis.causes import Cause
from mlx_supervisor.core.events import CommandKind, Phase
from mlx_supervisor.core.machine.restarting import after_exit
from mlx_supervisor.core.machine.run_state import REASON_LIMIT_CHARS, Ending, Run
from mlx_supervisor.core.machine.starting import batch_as_requested
from mlx_supervisor.core.machine.states import S
from mlx_supervisor.core.memory.breaker import BreakerState, Trip
from mlx_supervisor.core.words import counted, duration, figures, mebibytes, sentence, size, validation_text

FINDINGS_AT_MOST = 24
FINDING_LIMIT_CHARS = 300
AUTOPSY_GRACE_TIMES = 2
"""A worker that must stop gets an autopsy only if its grace period is this many times the autopsy's limit."""


def on_command_before_ready(run: Run, event: ev.Command) -> None:
    if event.kind is CommandKind.KILL:
        _kill(run, event, _requested(event))
    elif event.kind is not CommandKind.START:
        _record(run, event)
        run.say(event.kind.value, sentence(f"{_request_text(event)}; the worker is not ready yet, sending SIGTERM"))
        run.terminate(event.at_s, _requested(event), run.policy.restart.term_grace_s)


def on_command_running(run: Run, event: ev.Command) -> None:
    if event.kind is CommandKind.KILL:
        _kill(run, event, _requested(event))
    elif event.kind is not CommandKind.START:
        does = "tries to save once more" if run.waiting_for else "saves a checkpoint"
        _record(run, event)
        run.say(event.kind.value, sentence(f"{_request_text(event)}; the worker {does} and exits"))
        run.drain(event.at_s, _requested(event))


def on_command_ending(run: Run, event: ev.Command) -> None:
    """The cause of the end stays; the command decides what follows."""
    assert run.ending is not None
    if event.kind in (CommandKind.START, CommandKind.RESTART):
        run.ending = replace(run.ending, restart=True, requested_by="")
        _record(run, event)
        return
    run.ending = replace(run.ending, restart=False, requested_by=_request_text(event))
    if event.kind is CommandKind.KILL and run.state is not S.KILLING:
        _kill(run, event, run.ending)
        return
    _record(run, event)
    if run.state is S.DRAINING and run.waiting_for:
        run.say(event.kind.value, sentence(f"{_request_text(event)}; the worker tries to save once more and exits"))
        run.out.append(RequestStop(run.history.generation, run.ending.requested_by[:REASON_LIMIT_CHARS]))
        run.deadline_s = event.at_s + run.policy.restart.stop_grace_s


def _record(run: Run, event: ev.Command) -> None:
    """Save whether the run is to continue, before anything follows: the supervisor may die before the worker ends."""
    past, continues = run.history, run.suspending or event.kind not in (CommandKind.STOP, CommandKind.KILL)
    stop = "" if continues else event.reason[:REASON_LIMIT_CHARS] or _request_text(event)
    if (past.unfinished, past.stop_requested) != (continues, stop):
        past.unfinished, past.stop_requested = continues, stop
        run.save()


def _kill(run: Run, event: ev.Command, ending: Ending) -> None:
    run.say("kill", sentence(f"{_request_text(event)}; killing the worker"), Severity.WARNING)
    run.kill(event.at_s, ending)
    _record(run, event)


def _requested(event: ev.Command) -> Ending:
    text = event.reason[:REASON_LIMIT_CHARS] or _request_text(event)
    return Ending(Cause.REQUESTED, text, restart=event.kind is CommandKind.RESTART)


def on_step_before_ready(run: Run, event: ev.StepReport) -> None:
    """The ready message may be lost: a worker that makes steps is ready."""
    if batch_as_requested(run, event.at_s, event.batch_size):
        run.batch.adopt(event.batch_size, max(event.samples, event.batch_size))
        run.say("ready", f"Ready (inferred from step {event.step}; the ready message was lost).", Severity.WARNING)
        run.go(S.RUNNING)
        run.heartbeat.progress(event.at_s, Phase.TRAIN, event.seconds)
        on_step_recorded(run, event)


def on_start_timeout(run: Run, event: ev.Tick) -> None:
    if run.blocked:  # no worker was started, and none may be
        run.say("start_blocked", f"Start still blocked: {run.blocked}.", Severity.ERROR)
        run.deadline_s = event.at_s + run.policy.restart.start_timeout_s
        return
    text = f"not ready after {duration(run.policy.restart.start_timeout_s)}"
    run.say("start_timeout", f"The worker is {text}; sending SIGTERM.", Severity.ERROR)
    ending = Ending(Cause.START_TIMEOUT, text, restart=True)
    run.terminate(event.at_s, ending, run.policy.restart.term_grace_s)


def on_spawn_failed(run: Run, event: ev.ActionFailed) -> None:
    if event.action != "spawn" or run.current is None or run.current.pid is not None:
        return
    delay_s = run.budget.start_refused() if event.passing else None
    if delay_s is None:
        after_exit(run, event.at_s, Ending(Cause.SPAWN_FAILED, event.error, restart=True), "not started")
        return
    run.reason = f"failed to start the worker: {event.error}; next attempt in {duration(delay_s)}"
    run.say("spawn_failed", sentence(run.reason), Severity.ERROR)
    run.current.error = run.history.error = event.error
    run.close_generation(event.at_s, "not started", Cause.SPAWN_FAILED)
    run.go(S.BACKOFF, event.at_s + delay_s)


def on_step_recorded(run: Run, event: ev.StepReport) -> None:
    run.history.add_step(event, run.last_step)
    run.history.error = ""
    run.last_step, run.phase = event, event.phase
    run.rate.add(event)
    if run.current is not None:
        run.current.add_step(event)
    run.growth.add(event, run.last_sample)


def on_step(run: Run, event: ev.StepReport) -> None:
    on_step_recorded(run, event)
    run.heartbeat.progress(event.at_s, Phase.TRAIN, event.seconds)
    if event.phase is not Phase.TRAIN:
        return
    state_before = run.breaker.state
    on_device = event.device_limit_bytes > 0  # then the arrays are none of the machine's memory
    of_host = replace(event, active_bytes=0, cache_bytes=0) if on_device else event
    trips = run.breaker.step(of_host, run.batch.at_minimum), run.device.step(event, run.batch.at_minimum)
    trip = trips[0] or trips[1]
    if run.current is not None:
        run.current.peak_device_bytes = run.device.peak_bytes
    if trip is not None:
        _soft_trip(run, event.at_s, trip)
        return
    leaking = run.breaker.leaking or run.device.leaking
    if leaking:
        _request_autopsy(run)
    if run.breaker.state is not state_before:
        run.say("breaker", f"Stable for {counted(run.policy.restart.close_after_steps, 'update')} since the restart.")
    if run.breaker.state is BreakerState.CLOSED and not leaking:
        _grow(run)


def _grow(run: Run) -> None:
    larger, effective = run.batch.good_step(), run.batch.effective
    if larger is not None and effective is not None:
        run.say("grow", f"Growing micro-batch to {larger} from the next update.", batch_size=larger)
        run.save()
        run.out.append(RequestResize(run.history.generation, larger, effective))


def on_phase(run: Run, event: ev.PhaseChange) -> None:
    run.breaker.phase(event.phase)
    run.device.phase(event.phase)
    if run.current is not None:
        run.current.loading = event.phase is Phase.LOAD
    run.phase = event.phase
    if run.state is S.RUNNING:
        run.heartbeat.progress(event.at_s, event.phase)
    if bool(event.waiting_for) != bool(run.waiting_for):  # a notice at either end: the worker repeats it for hours
        _say_wait(run, event)
    run.waiting_for = event.waiting_for
    if run.state is S.DRAINING and event.waiting_for and run.ending is not None and run.ending.waits:
        run.deadline_s = event.at_s + run.policy.restart.stop_grace_s


def _say_wait(run: Run, event: ev.PhaseChange) -> None:
    if event.waiting_for:
        run.say("wait", f"Waiting for {event.waiting_for}.", Severity.WARNING)
    else:
        run.say("wait", f"The wait is over. The newest checkpoint is of step {run.history.durable_step}.")


def on_validation(run: Run, event: ev.ValidationReport) -> None:
    past = run.history
    past.add_validation(event.step, event.loss)
    past.validation_metrics = dict(event.metrics)
    text = validation_text(event.loss, event.step, past.best_validation_loss, past.best_validation_step)
    run.say(
        "validation",
        f"Validation loss {', '.join([text, *figures(event.metrics)])}.",
        step=event.step,
        loss=event.loss if isfinite(event.loss) else None,
        best_loss=past.best_validation_loss,
        best_step=past.best_validation_step,
    )
    run.save(wait=False)


def on_tested(run: Run, event: ev.Tested) -> None:
    loss = event.loss if event.loss is not None and isfinite(event.loss) else None
    run.history.test_loss = loss
    run.say("test", event.text, loss=loss)
    run.save(wait=False)


def on_checkpoint(run: Run, event: ev.CheckpointReport) -> None:
    run.history.stall_s += event.stall_s
    if run.state is S.RUNNING:
        run.heartbeat.checkpointed(event.at_s)
    if event.ok:
        if run.failed_checkpoints and not run.waiting_for:
            run.say("checkpoints_again", f"Checkpoints are saved again: step {event.step}.", step=event.step)
        run.failed_checkpoints = 0
        run.history.durable_step = max(run.history.durable_step, event.step)
        run.breaker.checkpoint(event.seconds)
        run.device.checkpoint(event.seconds)
        text = f"Saved checkpoint of step {event.step}: {size(event.size_bytes)} in {duration(event.seconds)}."
        run.say("checkpoint", text, step=event.step, seconds=event.seconds, quiet=True)
        run.save(wait=False)
        if run.state is S.DRAINING and not run.drain_extended:
            # this checkpoint may have begun before the stop request; the final one still needs time
            run.drain_extended = True
            run.deadline_s = event.at_s + run.policy.restart.stop_grace_s
    else:
        run.failed_checkpoints += 1
        if run.failed_checkpoints.bit_count() == 1:  # the 1st, 2nd, 4th, … in a row: a full disk may last for hours
            count = "" if run.failed_checkpoints == 1 else f" ({run.failed_checkpoints} checkpoints failed in a row)"
            text = sentence(f"{event.error}: step {event.step} not saved{count}")
            run.say("checkpoint_failed", text, Severity.ERROR, step=event.step)
    for each in event.notes:
        run.say("checkpoint_note", sentence(each), Severity.WARNING, step=event.step)


def on_bye(run: Run, event: ev.Bye) -> None:
    run.bye = event
    run.history.target_steps = event.target_steps or run.history.target_steps


def on_sample(run: Run, event: ev.Sample) -> None:
    run.missing = 0
    run.last_sample = event
    if run.current is not None:
        run.current.peak_footprint_bytes = max(run.current.peak_footprint_bytes, event.footprint_bytes)
    trip = run.breaker.sample(event)
    if trip is not None:
        _hard_trip(run, event.at_s, trip)


def on_device_found(run: Run, event: ev.DeviceFound) -> None:
    run.device.found(event)
    limit, total = mebibytes(event.limit_bytes, event.total_bytes)
    text = f"The worker computes on a device with its own memory: limit {limit} of {total} MiB (memory.device_limit)."
    run.say("device", text, quiet=run.history.generation > 1, limit_bytes=event.limit_bytes)


def on_device_sample(run: Run, event: ev.DeviceSample) -> None:
    trip = run.device.sample(event)
    if run.current is not None:
        run.current.peak_device_bytes = run.device.peak_bytes
    if trip is not None:
        _hard_trip(run, event.at_s, trip)
    elif run.device.clear_due(event.at_s) and run.state is S.RUNNING:
        run.say("relief", "Device memory is over the limit with MLX's cache: clearing the cache.", Severity.WARNING)
        run.out.append(RequestClearCache(run.history.generation))


def on_sample_relieving(run: Run, event: ev.Sample) -> None:
    on_sample(run, event)
    if run.state is S.RELIEVING and run.cleared and run.breaker.relieved(event.footprint_bytes):
        run.say("relieved", f"Clearing the caches was enough: footprint {size(event.footprint_bytes)}.")
        run.relief = None
        run.heartbeat.progress(event.at_s, Phase.TRAIN)
        run.go(S.RUNNING)


def on_cleared(run: Run, _: ev.Cleared) -> None:
    run.cleared = True


def on_sample_missing(run: Run, event: ev.SampleMissing) -> None:
    run.missing += 1
    if run.missing < run.policy.memory.missing_samples:
        return
    text = f"{run.missing} consecutive memory samples failed ({event.reason})"
    run.say("blind", f"{text}; restarting the worker (memory.missing_samples).", Severity.ERROR)
    ending = Ending(Cause.BLIND, text, restart=True)
    if run.state is S.STARTING:
        run.terminate(event.at_s, ending, run.policy.restart.term_grace_s)
    else:
        run.drain(event.at_s, ending)


def _soft_trip(run: Run, at_s: float, trip: Trip) -> None:
    if trip.relievable and run.policy.memory.clear_first:
        text = sentence(f"{trip.text}: clearing the caches first")
        run.say("relief", text, Severity.WARNING)
        run.relief, run.cleared = trip, False
        run.out.append(RequestClearCache(run.history.generation))
        _request_autopsy(run)
        run.go(S.RELIEVING, at_s + run.policy.memory.relief_wait_s)
    else:
        _trip_and_drain(run, at_s, trip)


def on_relief_timeout(run: Run, event: ev.Tick) -> None:
    assert run.relief is not None
    _trip_and_drain(run, event.at_s, run.relief)


def _trip_and_drain(run: Run, at_s: float, trip: Trip) -> None:
    run.count_trip()
    text = sentence(f"{trip.text}: saving a checkpoint, then restarting")
    run.say("trip", text, Severity.WARNING, hard=False)
    if run.policy.restart.stop_grace_s >= AUTOPSY_GRACE_TIMES * run.policy.memory.autopsy_limit_s:
        _request_autopsy(run)  # before the stop request: a stopping worker may ignore later ones
    run.drain(at_s, Ending(trip.cause, trip.text, restart=True))


def _hard_trip(run: Run, at_s: float, trip: Trip) -> None:
    if run.ending is None:
        run.count_trip()
    # before the notice, which is for the log: the restart's has the figures too, and what follows
    run.kill(at_s, run.ending or Ending(trip.cause, trip.text, restart=True))
    run.say("trip", sentence(f"{trip.text}: killing the worker"), Severity.WARNING, hard=True, quiet=True)


def _request_autopsy(run: Run) -> None:
    """At most one autopsy per generation."""
    memory = run.policy.memory
    if memory.autopsy and not run.autopsy_requested:
        run.autopsy_requested = run.autopsy_due = True
        run.heartbeat.extend(memory.autopsy_limit_s)
        run.out.append(RequestAutopsy(run.history.generation, memory.autopsy_limit_s))


def on_autopsied(run: Run, event: ev.Autopsied) -> None:
    """One report per request: others are ignored, as their findings would flood the log."""
    if not run.autopsy_due:
        return
    run.autopsy_due = False
    run.heartbeat.extend(0.0)
    findings = [each[:FINDING_LIMIT_CHARS] for each in event.findings[:FINDINGS_AT_MOST]]
    when = f"at step {event.step}" if event.complete else f"at step {event.step} (incomplete)"
    for each in findings:
        run.say("autopsy", f"Autopsy {when}: {each}", Severity.WARNING, step=event.step, quiet=True)
    if not findings:
        text = f"Autopsy {when}: no growth found; the search took {duration(event.seconds)}."
        run.say("autopsy", text, quiet=True)
    found = headline(findings, cut_short=not event.complete)
    run.say("leak", found.text, Severity.WARNING if found.what else Severity.INFO, quiet=found.what == run.found != "")
    run.found = found.what
    if run.current is not None:
        run.current.autopsy = findings
    run.history.autopsy = findings


def _request_text(event: ev.Command) -> str:
    reason = f" ({event.reason[:REASON_LIMIT_CHARS]})" if event.reason else ""
    return f"{event.kind.value} requested{reason}"
