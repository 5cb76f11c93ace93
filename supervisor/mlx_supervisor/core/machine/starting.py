"""How a worker's life begins: commands to a run at rest, what comes before a start, and the way to its first step."""

from mlx_supervisor.core import events as ev
from mlx_supervisor.core.actions import CloseGeneration, Severity, Spawn
from mlx_supervisor.core.diagnosis.causes import Cause
from mlx_supervisor.core.events import CommandKind, Phase
from mlx_supervisor.core.history import Generation
from mlx_supervisor.core.machine.heartbeat import Heartbeat
from mlx_supervisor.core.machine.run_state import REASON_LIMIT_CHARS, Ending, Run
from mlx_supervisor.core.machine.states import S
from mlx_supervisor.core.restart.escalation import checkpoints_gradients


def on_command_at_rest(run: Run, event: ev.Command) -> None:
    if event.kind in (CommandKind.START, CommandKind.RESTART):
        if run.survivor is not None:
            text = f"Not started: a process of generation {run.survivor} is still there, unkillable."
            run.say("start_refused", text, Severity.ERROR)
            return
        if not run.history.wanted:
            run.budget.forget()
        run.say("start", "Starting.", batch_size=run.batch.size)
        _cool_down(run, event.at_s)
    elif event.kind is not CommandKind.SUSPEND and run.history.generation > 0 and run.history.outcome == "":
        # a supervisor died in the middle of it, and now nobody wants it to go on
        run.finish(S.STOPPED, event.reason[:REASON_LIMIT_CHARS] or "stopped before it was started again")


def _cool_down(run: Run, at_s: float) -> None:
    """After a restart of the machine, which the run may have caused: not at once. Else start."""
    if run.cool_until_s is None:  # the supervisor that took over is gone too
        run.cool_until_s = at_s + run.policy.restart.reboot_cooldown_s
    if not run.history.cooling or run.cool_until_s <= at_s:
        start(run, at_s)
        return
    text = f"the machine restarted under the run, which goes on in {run.cool_until_s - at_s:.0f} s"
    _pause(run, "cooldown", f"{text} (restart.reboot_cooldown_s)")
    run.go(S.BACKOFF, run.cool_until_s)
    run.save()


def _pause(run: Run, kind: str, text: str) -> None:
    """A start that is still to come: a supervisor that dies meanwhile must not forget it."""
    run.history.wanted, run.history.outcome = True, ""
    run.reason = text
    run.say(kind, f"{text[0].upper()}{text[1:]}.", Severity.WARNING)


def on_survivor_gone(run: Run, event: ev.Exited) -> None:
    if run.survivor is not None:
        run.say("survivor_gone", f"The unkillable process of generation {run.survivor} is gone.")
        run.survivor = None
        if run.ending is not None:
            run.close_generation(event.at_s, "not killable", run.ending.cause)


def on_command_in_backoff(run: Run, event: ev.Command) -> None:
    if event.kind in (CommandKind.START, CommandKind.RESTART):
        spawn(run, event.at_s)
        return
    if event.kind is not CommandKind.SUSPEND:
        run.history.cooling = False  # somebody is there, who may start it again at once
    run.go(S.STOPPED)
    run.finish(S.STOPPED, event.reason[:REASON_LIMIT_CHARS] or "stopped while waiting to restart")


def on_command_while_waiting(run: Run, event: ev.Command) -> None:
    if event.kind is not CommandKind.SUSPEND:
        run.memory.accept()
    on_command_in_backoff(run, event)


def on_recovered(run: Run, event: ev.Recovered) -> None:
    past = run.history
    run.survivor = None
    if event.generation == past.generation:  # else an older one, whose end alone could not be noted
        past.add_lost_generation(event)
    cause = Cause.HOST_LOST if event.machine_restarted else Cause.SUPERVISOR_LOST
    run.say("recovered", f"Took over generation {event.generation}: {cause.value}.", Severity.WARNING)
    life = Generation.recovered(event, run.batch.size, checkpoints_gradients(run.policy, past))
    run.out.append(CloseGeneration(event.generation, life.record(event.at_s, "lost", cause.value)))
    past.failures += event.machine_restarted  # a supervisor's death alone leaves the worker time to save
    spent = None
    if event.machine_restarted:
        past.cooling = True
        run.cool_until_s = event.at_s + run.policy.restart.reboot_cooldown_s
        spent = run.budget.rebooted(progress=past.durable_step > past.durable_before)
    if spent is not None:
        run.go(S.FATAL)
        run.finish(S.FATAL, spent)
        return
    run.save()


def on_backoff_over(run: Run, event: ev.Tick) -> None:
    start(run, event.at_s)


def on_machine_sample(run: Run, event: ev.MachineSample) -> None:
    run.memory.look(event.available_bytes, event.pressure)


def start(run: Run, at_s: float) -> None:
    """Start a worker, as soon as the machine has the memory."""
    wait_s = run.policy.restart.wait_for_memory_s
    if wait_s <= 0 or not run.memory.short(run.need_bytes):
        spawn(run, at_s)
        return
    there = run.memory.words(run.need_bytes)
    _pause(run, "waiting", f"waiting for memory: {there} (at most {wait_s:.0f} s: restart.wait_for_memory_s)")
    run.go(S.WAITING, at_s + wait_s)
    run.save()


def on_memory_polled(run: Run, event: ev.MachineSample) -> None:
    run.memory.look(event.available_bytes, event.pressure)
    if not run.memory.short(run.need_bytes):
        run.say("waited", f"Enough memory again ({run.memory.words(run.need_bytes)}): starting.")
        spawn(run, event.at_s)


def on_wait_over(run: Run, event: ev.Tick) -> None:
    """Another program may simply hold it: the run's own limit still stands, and it won't wait for that again."""
    there, after_s = run.memory.words(run.need_bytes), run.policy.restart.wait_for_memory_s
    text = f"Still {there} after {after_s:.0f} s: another program may hold the rest; starting all the same."
    run.say("waited", text, Severity.WARNING)
    run.memory.accept()
    spawn(run, event.at_s)


def spawn(run: Run, at_s: float) -> None:
    past = run.history
    past.generation += 1
    past.wanted, past.outcome, past.cooling = True, "", False
    past.durable_before = past.durable_step
    past.begin_generation()
    run.reason = ""
    run.breaker.begin_generation()
    run.memory.started()
    run.heartbeat = Heartbeat(run.policy.restart.hang_timeout_s)
    run.current = Generation(past.generation, at_s, batch_size=run.batch.size, durable_before=past.durable_step)
    run.current.gradient_checkpointing = checkpoints_gradients(run.policy, past)
    run.last_sample = run.last_step = run.ending = run.bye = run.relief = None
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


def on_spawned(run: Run, event: ev.Spawned) -> None:
    run.budget.started()
    if run.current is not None:
        run.current.pid = event.pid


def on_ready(run: Run, event: ev.Ready) -> None:
    past = run.history
    past.target_steps = event.target_steps
    past.durable_step = max(past.durable_step, event.step)
    past.highest_step = max(past.highest_step, event.step)
    past.can_checkpoint_gradients = event.can_checkpoint_gradients
    for each in event.passed_over:
        run.say("checkpoint_passed_over", f"Checkpoint passed over: {each}", Severity.WARNING)
    for each in event.notes:
        run.say("note", each)
    if not obeys(run, event.at_s, event.batch_size):
        return
    run.batch.adopt(event.batch_size, event.effective_batch)
    origin = f"from {event.checkpoint}" if event.checkpoint else "from the beginning"
    text = (
        f"Ready at step {event.step} of {event.target_steps}, {origin}; "
        f"{event.batch_size} samples at once, {event.effective_batch} an update{_in_which_way(run, event)}."
    )
    run.say("ready", text, step=event.step, target_steps=event.target_steps, batch_size=event.batch_size)
    run.heartbeat.progress(event.at_s, Phase.TRAIN)
    run.go(S.RUNNING)


def _in_which_way(run: Run, event: ev.Ready) -> str:
    assert run.current is not None
    asked = run.current.gradient_checkpointing
    run.current.ready_step = event.step
    run.current.gradient_checkpointing = event.gradient_checkpointing
    if event.gradient_checkpointing:
        return ", with gradient checkpointing"
    return ", without the gradient checkpointing asked for, which this task hasn't" if asked else ""


def obeys(run: Run, at_s: float, batch_size: int) -> bool:
    ordered = run.batch.size
    if ordered is None or batch_size == ordered:
        return True
    text = f"the worker holds {batch_size} samples at once, {ordered} were ordered"
    run.say("batch_mismatch", f"Bug: {text}.", Severity.ERROR)
    run.kill(at_s, Ending(Cause.REFUSED, text, restart=False))
    return False
