"""How a generation begins: commands to a run at rest, waits before a start, and everything up to the first step."""

from mlx_supervisor.core import events as ev
from mlx_supervisor.core.actions import CloseGeneration, Notice, Severity, Spawn
from mlx_supervisor.core.diagnosis.causes import Cause
from mlx_supervisor.core.events import CommandKind, Phase
from mlx_supervisor.core.history import Generation
from mlx_supervisor.core.machine.heartbeat import Heartbeat
from mlx_supervisor.core.machine.run_state import ALREADY_COMPLETE, REASON_LIMIT_CHARS, Ending, Run
from mlx_supervisor.core.machine.states import S
from mlx_supervisor.core.machine.unheard import count_unheard
from mlx_supervisor.core.rate import Rate
from mlx_supervisor.core.restart.escalation import checkpoints_gradients
from mlx_supervisor.core.restart.update_growth import UpdateGrowth
from mlx_supervisor.core.words import duration, sentence, size

AUTOSTART = "autostart"
"""The reason of a start that no person requested."""
KEPT = ("outcome", "reason", "error", "target_steps", "weights_sha256", "active_s")
"""Of the history: what a start that is refused does not change."""
LITTLE_ROOM_SHARE = 0.85
"""Share of the limit that a loaded worker may hold without a warning."""


def on_command_at_rest(run: Run, event: ev.Command) -> None:
    if event.kind in (CommandKind.START, CommandKind.RESTART):
        if run.survivor is not None:
            text = f"Start refused: a process of generation {run.survivor} survived SIGKILL and is still running."
            run.say("start_refused", text, Severity.ERROR)
            return
        past = run.history
        past.refused = ""
        if _is_complete(run):
            text = f"Already complete at step {run.history.highest_step}; nothing was trained. --fresh starts over."
            run.say("already_complete", text)
            run.reason = ALREADY_COMPLETE
            run.save()
            return
        run.rested = {name: getattr(past, name) for name in KEPT}
        if not past.outcome:
            run.rested |= {"outcome": "stopped", "reason": "interrupted", "error": ""}
        if not run.history.unfinished:
            run.budget.reset()
        if not run.history.unfinished or event.reason != AUTOSTART:
            run.history.starts += 1
        run.out.append(
            Notice("start", "Starting.", generation=past.generation + 1, fields={"batch_size": run.batch.size})
        )
        _cool_down(run, event.at_s)
    elif event.kind is not CommandKind.SUSPEND and run.history.generation > 0 and run.history.outcome == "":
        # the supervisor died during the run, and the run is not to be resumed
        run.finish(event.reason[:REASON_LIMIT_CHARS] or "stopped before the restart")


def _is_complete(run: Run) -> bool:
    """Whether a worker would have nothing to train, as far as is known without one.

    With what the run completed with (`task_digest`) it is complete, unless `steps` was raised; with anything else, a
    worker decides. If either is unknown, `steps` alone decides; without it, a worker.
    """
    steps, past = run.policy.steps, run.history
    if run.state is not S.COMPLETED or (steps is not None and steps > past.target_steps):
        return False
    known = "" not in (run.task_digest, past.completed_digest)
    return run.task_digest == past.completed_digest if known else steps is not None


def _cool_down(run: Run, at_s: float) -> None:
    """Start, but only after a wait if the machine restarted: the run may have caused that."""
    if run.cool_until_s is None:  # the supervisor that recovered the run died as well
        run.cool_until_s = at_s + run.policy.restart.reboot_cooldown_s
    if not run.history.cooling or run.cool_until_s <= at_s:
        start(run, at_s)
        return
    text = f"the machine restarted during this run; next start in {duration(run.cool_until_s - at_s)}"
    _pause(run, "cooldown", f"{text} (restart.reboot_cooldown_s)")
    run.go(S.BACKOFF, run.cool_until_s)
    run.save()


def _pause(run: Run, kind: str, text: str) -> None:
    """Keep a delayed start in the history, in case the supervisor dies before it."""
    run.history.unfinished, run.history.outcome, run.history.stop_requested = True, "", ""
    run.reason = text
    run.say(kind, sentence(text), Severity.WARNING)


def on_survivor_exited(run: Run, event: ev.Exited) -> None:
    if run.survivor is not None:
        text = f"Generation {run.survivor}, which survived SIGKILL, has exited; starts are allowed again."
        run.say("survivor_exited", text)
        durable_step = run.history.durable_step
        count_unheard(run, event)
        if run.history.durable_step > durable_step:
            run.save()
        run.survivor = None
        if run.ending is not None:
            run.close_generation(event.at_s, "survived SIGKILL", run.ending.cause)


def on_command_in_backoff(run: Run, event: ev.Command) -> None:
    if event.kind in (CommandKind.START, CommandKind.RESTART):
        spawn(run, event.at_s)
        return
    if event.kind is not CommandKind.SUSPEND:
        run.history.cooling = False  # a person stopped it: the next start needs no wait
    run.end(S.STOPPED, event.reason[:REASON_LIMIT_CHARS] or "stopped while waiting to restart")


def on_command_while_waiting(run: Run, event: ev.Command) -> None:
    if event.kind is not CommandKind.SUSPEND:
        run.memory.accept()
        run.device.wait.accept()
    on_command_in_backoff(run, event)


def on_recovered(run: Run, event: ev.Recovered) -> None:
    past = run.history
    run.survivor = None
    if event.generation == past.generation:  # else an older generation whose end was not recorded
        past.add_lost_generation(event)
    cause = Cause.HOST_LOST if event.machine_restarted else Cause.SUPERVISOR_LOST
    run.say("recovered", f"Recovered generation {event.generation}: {cause.value}.", Severity.WARNING)
    lost = Generation.recovered(event, run.batch.size, checkpoints_gradients(run.policy, past))
    run.out.append(CloseGeneration(event.generation, lost.record(event.at_s, "lost", cause.value)))
    past.failures += event.machine_restarted  # a supervisor's death alone leaves the worker time to save
    if event.machine_restarted:
        past.cooling = True
        run.cool_until_s = event.at_s + run.policy.restart.reboot_cooldown_s
        spent = run.budget.rebooted(progress=past.durable_step > past.durable_before)
        if spent is not None:
            run.end(S.FATAL, spent)
            return
    run.save()


def on_backoff_over(run: Run, event: ev.Tick) -> None:
    start(run, event.at_s)


def on_machine_sample(run: Run, event: ev.MachineSample) -> None:
    _update(run, event)


def _update(run: Run, event: ev.MachineSample) -> None:
    run.memory.update(event.available_bytes, event.pressure)
    run.device.wait.update(event.device_free_bytes)


def _must_wait(run: Run) -> bool:
    """Whether the machine or the device has too little memory for a start."""
    return run.memory.must_wait(run.need_bytes) or run.device.wait.must_wait


def _memory_figures(run: Run) -> str:
    return run.device.wait.figures if run.device.wait.must_wait else run.memory.figures(run.need_bytes)


def start(run: Run, at_s: float) -> None:
    """Start a worker as soon as enough memory is available."""
    wait_s = run.policy.restart.wait_for_memory_s
    if wait_s <= 0 or not _must_wait(run):
        spawn(run, at_s)
        return
    figures = _memory_figures(run)
    text = f"waiting for memory: {figures}; at most {duration(wait_s)} (restart.wait_for_memory_s)"
    _pause(run, "waiting", text)
    run.go(S.WAITING, at_s + wait_s)
    run.save()


def on_memory_polled(run: Run, event: ev.MachineSample) -> None:
    waited_for_device = run.device.wait.must_wait
    _update(run, event)
    if not _must_wait(run):
        figures = run.device.wait.figures if waited_for_device else run.memory.figures(run.need_bytes)
        run.say("waited", f"Memory is available again ({figures}): starting.")
        spawn(run, event.at_s)


def on_wait_over(run: Run, event: ev.Tick) -> None:
    """Start anyway: the limit still applies, and the run does not wait for the same memory again."""
    figures, waited = _memory_figures(run), duration(run.policy.restart.wait_for_memory_s)
    text = f"Memory still short after {waited} ({figures}); another program may hold it. Starting anyway."
    run.say("waited", text, Severity.WARNING)
    run.memory.accept()
    run.device.wait.accept()
    spawn(run, event.at_s)


def spawn(run: Run, at_s: float) -> None:
    past = run.history
    past.generation += 1
    past.unfinished, past.outcome, past.cooling, past.stop_requested = True, "", False, ""
    past.durable_before = past.durable_step
    past.begin_generation()
    run.reason = run.waiting_for = run.blocked = ""
    run.breaker.begin_generation()
    run.device.begin_generation()
    run.memory.worker_started()
    run.heartbeat = Heartbeat(run.policy.restart.hang_timeout_s)
    run.current = Generation(past.generation, at_s, batch_size=run.batch.size, durable_before=past.durable_step)
    run.current.gradient_checkpointing = checkpoints_gradients(run.policy, past)
    run.rate = Rate()
    run.growth = UpdateGrowth()
    run.last_sample = run.last_step = run.ending = run.bye = run.relief = None
    run.phase = Phase.LOAD
    run.missing = run.kills = 0
    run.autopsy_requested = run.autopsy_due = False
    run.go(S.STARTING, at_s + run.policy.restart.start_timeout_s)
    run.save()
    run.out.append(
        Spawn(
            past.generation,
            run.batch.size,
            run.batch.effective,
            past.tighter_steps,
            past.mean_time_between_failures_s,
            run.current.gradient_checkpointing,
        )
    )


def on_start_blocked(run: Run, event: ev.StartBlocked) -> None:
    """Wait without a limit: no failure is counted, and nothing starts beside another worker."""
    run.blocked = event.reason
    run.reason = event.reason if event.lasting else ""
    run.deadline_s = event.at_s + run.policy.restart.start_timeout_s
    text = f"Start blocked: {event.reason}."
    run.say("start_blocked", text, Severity.ERROR if event.lasting else Severity.WARNING)


def on_spawned(run: Run, event: ev.Spawned) -> None:
    if run.blocked and run.state is S.STARTING:
        run.deadline_s = event.at_s + run.policy.restart.start_timeout_s
        run.reason = ""
    run.blocked = ""
    run.budget.started()
    if run.current is not None:
        run.current.pid = event.pid


def on_ready(run: Run, event: ev.Ready) -> None:
    past = run.history
    past.error = ""
    past.target_steps = event.target_steps
    past.durable_step = max(past.durable_step, event.step)
    past.highest_step = max(past.highest_step, event.step)
    past.can_checkpoint_gradients = event.can_checkpoint_gradients
    for each in event.skipped:
        run.say("checkpoint_skipped", f"Skipped checkpoint: {each}", Severity.WARNING)
    if event.requested_size is not None and event.requested_effective is not None:
        run.batch.request(event.requested_size, event.requested_effective, event.batch_size)
    if not batch_as_requested(run, event.at_s, event.batch_size):
        return
    run.batch.adopt(event.batch_size, event.effective_batch)
    if run.current is not None:
        run.current.batch_size = event.batch_size
        run.current.accumulation = -(-event.effective_batch // event.batch_size)
    origin = f"resumed from {event.checkpoint}" if event.checkpoint else "from the beginning"
    text = (
        f"Ready at step {event.step} of {event.target_steps}, {origin}; "
        f"micro-batch {event.batch_size}, effective batch {event.effective_batch}{_gradient_checkpointing(run, event)}."
    )
    run.say("ready", text, step=event.step, target_steps=event.target_steps, batch_size=event.batch_size)
    for each in event.notes:
        run.say("note", each)
    _note_held(run)
    run.heartbeat.progress(event.at_s, Phase.TRAIN)
    run.go(S.RUNNING)


def _note_held(run: Run) -> None:
    """Record what the loaded worker holds; warn when the limit leaves little room for the first update."""
    assert run.current is not None
    run.current.loading = False
    if run.last_sample is None:
        return
    held_bytes, limit_bytes = run.last_sample.footprint_bytes, run.policy.memory.limit_bytes
    run.current.held_bytes = held_bytes
    if held_bytes > LITTLE_ROOM_SHARE * limit_bytes and run.history.trips == 0 and not run.history.proven(limit_bytes):
        text = (
            f"Little room: the worker holds {size(held_bytes)} before the first step; "
            f"the limit is {size(limit_bytes)} (memory.limit)."
        )
        run.say("little_room", text, Severity.WARNING)


def _gradient_checkpointing(run: Run, event: ev.Ready) -> str:
    """Adopt the worker's gradient checkpointing; returns the words for the ready notice."""
    assert run.current is not None
    requested = run.current.gradient_checkpointing
    run.current.ready_step = event.step
    run.current.gradient_checkpointing = event.gradient_checkpointing
    if event.gradient_checkpointing:
        return ", with gradient checkpointing"
    return ", without gradient checkpointing (requested, but not supported by this task)" if requested else ""


def batch_as_requested(run: Run, at_s: float, batch_size: int) -> bool:
    """Whether the worker uses the requested micro-batch; kill it if not."""
    requested = run.batch.size
    if requested is None or batch_size == requested:
        return True
    text = f"the worker uses micro-batch {batch_size}, but {requested} was requested"
    run.say("batch_mismatch", f"Bug: {text}.", Severity.ERROR)
    run.kill(at_s, Ending(Cause.REFUSED, text, restart=False))
    return False
