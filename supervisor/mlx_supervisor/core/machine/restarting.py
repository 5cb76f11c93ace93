"""What follows a generation: the next rung of the escalation ladder, a restart now or later, or the end of the run."""

from dataclasses import replace

from mlx_supervisor.core.actions import Field, Notice, Severity
from mlx_supervisor.core.diagnosis.causes import MEMORY_CAUSES, Cause, last_line
from mlx_supervisor.core.events import Outcome
from mlx_supervisor.core.history import Generation
from mlx_supervisor.core.machine.run_state import Ending, Run
from mlx_supervisor.core.machine.starting import spawn, start
from mlx_supervisor.core.machine.states import S
from mlx_supervisor.core.restart import external
from mlx_supervisor.core.restart.escalation import CROWDED, Rung, checkpoints_gradients, climb
from mlx_supervisor.core.restart.leak_per_pass import learn
from mlx_supervisor.core.words import counted, duration, sentence, shortened, size

NEAR_SHARE = 0.85
"""Share of the limit above which an unexplained death is attributed to memory."""
ERROR_CHARS = 80
"""Of an error in a notice; the whole error is in the notice's fields, the summary and stderr.log."""
WHAT = {
    Cause.REQUESTED: "",
    Cause.PRESSURE: "{text}",
    Cause.LEAK: "memory leak",
    Cause.OOM_KILL: "{text}",
    Cause.HANG: "the worker hung ({text})",
    Cause.START_TIMEOUT: "the worker was {text}",
    Cause.CRASH: "the worker crashed: {text}",
    Cause.KILLED: "{text}",
    Cause.INTERRUPTED: "{text}",
    Cause.SPAWN_FAILED: "failed to start the worker: {text}",
    Cause.BLIND: "memory could not be measured",
}
"""How a restart's sentence begins; `text`: of the ending. Other causes are named before it."""
UNREADY_TRIPS_AT_MOST = 2
"""Generations over the limit without any message: the ready message of one may have been lost."""


def after_exit(run: Run, at_s: float, ending: Ending, ended: str) -> None:
    """Record the cause, take the next rung, and restart the run or end it."""
    current, past, cause = run.current, run.history, ending.cause
    assert current is not None
    refused = cause is Cause.REFUSED and current.first_step is None
    if run.bye is not None and not refused:
        past.weights_sha256 = run.bye.weights_sha256
    past.failures += _lost_work(run, cause)
    if current.first_step is not None:
        run.rested = None
    run.need_bytes = current.peak_footprint_bytes or run.need_bytes
    saved = past.durable_step > current.durable_before
    progress = saved and cause is not Cause.BLIND
    per_pass = _leak_per_pass(run, ending, progress=progress)
    cause = Cause.LEAK if per_pass is not None else cause
    ending = replace(ending, cause=cause)
    if cause is not Cause.REQUESTED:
        current.error = past.error = ending.text
    run.close_generation(at_s, ended, cause)
    rung = per_pass or _climb(run, ending, progress=progress)
    if refused:
        run.refuse(ending.text)
        return
    if not ending.restart:
        run.end(S.FATAL if cause is Cause.REFUSED else S.STOPPED, (ending.requested_by or ending.text) + _lost(run))
        return
    final = _reason_to_give_up(run, ending, rung, progress, at_s)
    if final is not None:
        run.end(S.FATAL, final)
        return
    past.tighter_steps = _tighter_interval(run, current, saved)
    _restart(run, at_s, ending, ended, rung, run.budget.delay_s(cause, progress=progress, eased=rung.eased, at_s=at_s))


def _leak_per_pass(run: Run, ending: Ending, *, progress: bool) -> Rung | None:
    """The response to a leak that a smaller micro-batch does not slow; None if the death is of another kind."""
    if ending.crowded:
        return None
    limit_bytes = run.device.limit_bytes or run.policy.memory.limit_bytes
    rung = learn(run.batch, run.history, run.growth, ending.cause, limit_bytes=limit_bytes, progress=progress)
    if rung is not None and ending.restart:
        run.say("leak_per_pass", sentence(rung.text[0].upper() + rung.text[1:]), batch_size=run.batch.size)
    return rung


def _climb(run: Run, ending: Ending, *, progress: bool) -> Rung:
    return CROWDED if ending.crowded else climb(run.policy, run.batch, run.history, ending.cause, progress=progress)


def _restart(run: Run, at_s: float, ending: Ending, ended: str, rung: Rung, delay_s: float) -> None:
    cause = ending.cause
    if cause is Cause.NOT_FINITE:
        run.say("not_finite", f"{_what(ending)} {sentence(ending.advice)}", Severity.WARNING, error=ending.text)
    how = f"in {duration(delay_s)} " if delay_s else ""
    what = _what(ending)
    if cause in external.EXTERNAL_CAUSES:
        what += external.text(run.history, at_s, run.policy.restart.max_external)
    parts = [what, f"restarting {how}{_with_batch(run)}".rstrip() + _steps_lost(run) + _lost(run), rung.end]
    text = sentence("; ".join(part for part in parts[cause is Cause.NOT_FINITE :] if part))
    facts: dict[str, Field] = {"cause": cause.value, "batch_size": run.batch.size, "batch": rung.text}
    facts |= {"error": ending.text, "ended": ended}
    run.out.append(Notice("restart", text, Severity.WARNING, run.history.generation, facts))
    if ending.advice not in ("", run.advised) and cause is not Cause.NOT_FINITE:
        run.advised = ending.advice
        run.say("advice", f"Advice: {ending.advice}.")
    if delay_s:
        run.reason = text
        run.go(S.BACKOFF, at_s + delay_s)
        run.save()
    elif cause is Cause.SPAWN_FAILED:  # no worker ran, so there is no memory to wait for
        spawn(run, at_s)
    else:
        start(run, at_s)


def _lost(run: Run) -> str:
    """What the stopped worker could not save or export: part of a sentence, or ""."""
    return f"; {run.bye.lost}" if run.bye is not None and run.bye.lost else ""


def _what(ending: Ending) -> str:
    """What ended the generation, as the beginning of a sentence; "" after a request."""
    cause, text = ending.cause, shortened(last_line(ending.text), ERROR_CHARS).rstrip(".")
    if cause is Cause.NOT_FINITE:
        return sentence(text.partition(" (")[0])
    if cause is Cause.DEVICE_OOM and text.startswith("this run held "):  # the error itself is in the summary
        return f"{cause.value}: {last_line(ending.text).partition('; ')[0]}"
    if cause in (Cause.PRESSURE, Cause.LEAK) and text.startswith(("used ", "device memory used ")):
        return f"{text}: worker killed"
    if cause is Cause.PRESSURE and text.startswith(("memory ", "device memory ")):
        return cause.value  # as for a leak, the trip's notice has the figures
    return WHAT[cause].format(text=text) if cause in WHAT else f"{cause.value}: {text}"


def _with_batch(run: Run) -> str:
    size, effective = run.batch.size, run.batch.effective
    if size is None or effective is None:
        return ""
    more = " and gradient checkpointing" if checkpoints_gradients(run.policy, run.history) else ""
    return f"with batch {size} × {-(-effective // size)}{more}"


def _steps_lost(run: Run) -> str:
    """Updates that the next generation repeats; "" for a generation that made none."""
    last = run.current.last_step if run.current is not None else None
    return "" if last is None else f", {counted(max(last - run.history.durable_step, 0), 'step')} lost"


def _lost_work(run: Run, cause: Cause) -> bool:
    """Whether the end of the generation could cost updates: not if it made none, or saved the last one."""
    trained = run.current is not None and run.current.first_step is not None
    orderly = run.bye is not None and run.bye.outcome is Outcome.STOPPED
    return trained and cause not in (Cause.REQUESTED, Cause.REFUSED) and not orderly


def _reason_to_give_up(run: Run, ending: Ending, rung: Rung, progress: bool, at_s: float) -> str | None:
    """Why there is no restart, or None."""
    cause = ending.cause
    if cause is Cause.REQUESTED:
        run.budget.reset()
        return None
    advice = f"; {ending.advice}" if ending.advice else ""
    repeated = _repeated_error(run, ending, advice)
    uptime_s = 0.0 if run.current is None else at_s - run.current.started_s
    spent = run.budget.generation_ended(cause, progress=progress, eased=rung.eased, uptime_s=uptime_s, at_s=at_s)
    return _limit_too_low(run, cause, rung) or repeated or (spent and f"{ending.text.rstrip('.')}; {spent}{advice}")


def _repeated_error(run: Run, ending: Ending, advice: str) -> str | None:
    """An error that repeats at the same step would repeat every time."""
    assert run.current is not None
    step = max(0 if run.bye is None else run.bye.step, run.current.last_step or 0, run.current.ready_step)
    if not run.budget.repeated(ending.cause, ending.error_key, step):
        return None
    times, last = run.history.same_errors, ending.text.rstrip(".")
    if ending.cause is Cause.NOT_FINITE:
        return f"{last}, {times} times in a row. {sentence(ending.advice)}"
    at = f"at step {step}" if step else "before the first step"
    return f"{last}; the same error {times} times in a row {at} (restart.max_same_error){advice}"


def _limit_too_low(run: Run, cause: Cause, rung: Rung) -> str | None:
    """Give up at once when not even the first step fits under the limit."""
    current, memory = run.current, run.policy.memory
    limit_bytes = memory.limit_bytes
    if cause not in MEMORY_CAUSES or current is None or run.history.proven(limit_bytes):
        return None
    used_bytes = current.peak_footprint_bytes
    if used_bytes <= NEAR_SHARE * limit_bytes:
        return None
    before_ready = current.loading or (current.held_bytes == 0 and run.history.target_steps == 0)
    run.unready_trips += before_ready
    hopeless = current.loading or run.unready_trips >= UNREADY_TRIPS_AT_MOST  # of which the micro-batch is no part
    when = "before the model was loaded" if before_ready else f"before the first step at micro-batch {run.batch.size}"
    if current.held_bytes > memory.soft_share * limit_bytes and current.first_step is None:
        hopeless, used_bytes, when = True, current.held_bytes, "with the model loaded, before the first step"
    if rung.eased and not hopeless:
        return None
    return (
        f"the limit of {size(limit_bytes)} is too low for this run: "
        f"it used {size(used_bytes)} {when}; raise memory.limit or choose a smaller model"
    )


def _tighter_interval(run: Run, current: Generation, saved: bool) -> int | None:
    """Steps between checkpoints for the next generation: fewer after one that saved none, more after longer ones."""
    tighter = run.history.tighter_steps
    if current.first_step is None or current.last_step is None:
        return tighter
    half = max(1, (current.last_step - current.first_step + 1) // 2)
    if saved:
        return None if tighter is None else max(half, tighter)
    return min(half, tighter or half)
