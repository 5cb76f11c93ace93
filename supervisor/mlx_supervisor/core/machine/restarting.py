"""What follows from a life that is over: the next rung of the ladder, another life now or later, or the end."""

from mlx_supervisor.core.actions import Severity
from mlx_supervisor.core.diagnosis.causes import MEMORY_CAUSES, Cause, last_line
from mlx_supervisor.core.events import Outcome
from mlx_supervisor.core.history import Generation
from mlx_supervisor.core.machine.run_state import Ending, Run
from mlx_supervisor.core.machine.starting import spawn, start
from mlx_supervisor.core.machine.states import S
from mlx_supervisor.core.policy import MIB
from mlx_supervisor.core.restart.escalation import Rung, climb

NEAR_SHARE = 0.85
"""Share of the limit above which a death that nobody explains is put down to memory."""
UNREADY_TRIPS_AT_MOST = 2
"""Lives that the limit ended before a word of the worker's readiness: one such word may have been lost."""


def after_exit(run: Run, at_s: float, ending: Ending, ended: str) -> None:
    """Name the cause, decide what changes, and whether there is another life."""
    life, past, cause = run.current, run.history, ending.cause
    assert life is not None
    if run.bye is not None:
        past.weights_sha256 = run.bye.weights_sha256
    past.failures += _lost_work(run, cause)
    run.need_bytes = life.peak_footprint_bytes or run.need_bytes
    saved = past.durable_step > life.durable_before
    progress = saved and cause is not Cause.BLIND
    if cause is not Cause.REQUESTED:
        life.error = past.error = ending.text
    run.close_generation(at_s, ended, cause)
    rung = climb(run.policy, run.batch, past, cause, progress=progress)
    if not ending.restart:
        _come_to_rest(run, ending)
        return
    final = _final_word(run, ending, rung, progress, at_s - life.started_s)
    if final is not None:
        run.go(S.FATAL)
        run.finish(S.FATAL, final)
        return
    past.tighter_steps = _tighter(run, life, saved)
    _go_on(run, at_s, ending, ended, rung, run.budget.delay_s(cause, progress=progress, eased=rung.eased))


def _go_on(run: Run, at_s: float, ending: Ending, ended: str, rung: Rung, delay_s: float) -> None:
    parts = [f"The worker ended ({ended}): {ending.cause.value}{_in_brackets(ending, ended)}", rung.text]
    parts += [ending.advice, f"next start in {delay_s:.0f} s" if delay_s else "it is started again"]
    text = "; ".join(part for part in parts if part)
    cause = ending.cause
    run.say("restart", f"{text}.", Severity.WARNING, cause=cause.value, batch_size=run.batch.size)
    if delay_s:
        run.reason = text
        run.go(S.BACKOFF, at_s + delay_s)
        run.save()
    elif cause is Cause.SPAWN_FAILED:  # nothing ran: there is no memory to come back
        spawn(run, at_s)
    else:
        start(run, at_s)


def _lost_work(run: Run, cause: Cause) -> bool:
    """Whether what ended the life could cost updates: not when it had made none, or could save the last."""
    trained = run.current is not None and run.current.first_step is not None
    orderly = run.bye is not None and run.bye.outcome is Outcome.STOPPED
    return trained and cause not in (Cause.REQUESTED, Cause.REFUSED) and not orderly


def _final_word(run: Run, ending: Ending, rung: Rung, progress: bool, lived_s: float) -> str | None:
    """Why there is no other life, or None."""
    cause = ending.cause
    if cause is Cause.REQUESTED:
        run.budget.forget()
        return None
    repeated = _repeated(run, ending)
    spent = run.budget.generation_ended(cause, progress=progress, eased=rung.eased, lived_s=lived_s)
    hopeless = _hopeless(run, cause, rung)
    if hopeless is not None or repeated is not None:
        return hopeless or repeated
    if spent is None:
        return None
    advice = f"; {ending.advice}" if ending.advice else ""
    return f"{spent}; the last: {ending.text}{advice}"


def _repeated(run: Run, ending: Ending) -> str | None:
    """What comes again at the same step will come every time."""
    step = _died_at(run)
    if not run.budget.repeated(ending.cause, ending.error_key, step):
        return None
    times, last = run.history.same_errors, ending.text
    advice = f"; what helps: {ending.advice}" if ending.advice else ""
    if ending.cause is Cause.NOT_FINITE:
        return f"the loss was not finite {times} times in a row at step {step} ({last}){advice}"
    return f"the same error {times} times in a row after step {step} (restart.max_same_error): {last}{advice}"


def _died_at(run: Run) -> int:
    """The last step of the life that ended, as far as anybody said."""
    assert run.current is not None
    said = 0 if run.bye is None else run.bye.step
    return max(said, run.current.last_step or 0, run.current.ready_step)


def _hopeless(run: Run, cause: Cause, rung: Rung) -> str | None:
    """A limit that the very first steps can't keep: say so at once instead of trying again and again."""
    life, limit_bytes = run.current, run.policy.memory.limit_bytes
    if cause not in MEMORY_CAUSES or run.history.highest_step > 0 or life is None:
        return None
    if life.peak_footprint_bytes <= NEAR_SHARE * limit_bytes:
        return None
    before_ready = run.history.target_steps == 0
    run.unready_trips += before_ready
    if rung.eased and not (before_ready and run.unready_trips >= UNREADY_TRIPS_AT_MOST):
        return None
    where = "before the model was loaded" if before_ready else f"before the first step at batch {run.batch.size}"
    return (
        f"the limit of {limit_bytes / MIB:,.0f} MiB is below what this run needs: "
        f"it reached {life.peak_footprint_bytes / MIB:,.0f} MiB {where}; "
        f"raise memory.limit or choose a smaller model"
    )


def _tighter(run: Run, life: Generation, saved: bool) -> int | None:
    """A life that ended before its first checkpoint: let the next one save sooner. Longer lives widen it again."""
    tighter = run.history.tighter_steps
    if life.first_step is None or life.last_step is None:
        return tighter
    half = max(1, (life.last_step - life.first_step + 1) // 2)
    if saved:
        return None if tighter is None else max(half, tighter)
    return min(half, tighter or half)


def _come_to_rest(run: Run, ending: Ending) -> None:
    state = S.FATAL if ending.cause is Cause.REFUSED else S.STOPPED
    run.go(state)
    run.finish(state, ending.requested_by or ending.text)


def _in_brackets(ending: Ending, ended: str) -> str:
    said = last_line(ending.text)
    return f" ({said})" if said not in ("", ended) and ending.cause is not Cause.REQUESTED else ""
