"""How a generation ends: hangs, requests, signals, and the meaning of an exit."""

from mlx_supervisor.core import events as ev
from mlx_supervisor.core.actions import DumpStacks, Kill, Severity
from mlx_supervisor.core.diagnosis.causes import MEMORY_CAUSES, Cause, diagnose, last_line
from mlx_supervisor.core.events import Outcome
from mlx_supervisor.core.machine.restarting import NEAR_SHARE, after_exit
from mlx_supervisor.core.machine.run_state import ALREADY_COMPLETE, Ending, Run
from mlx_supervisor.core.machine.states import S
from mlx_supervisor.core.machine.unheard import count_unheard
from mlx_supervisor.core.words import duration

KILLS_AT_MOST = 3
DUMP_WAIT_S = 2.0
OTHERS = "end other processes on the device, or set memory.device_limit to what they leave"
EXIT_STOPPED_CODE = 75
EXIT_REFUSED_CODE = 78


def on_hang(run: Run, event: ev.Tick) -> None:
    text = f"no progress for {duration(run.heartbeat.allowance_s)}"
    run.say("hang", f"Hang: {text}. Dumping the worker's stacks to its stderr, then sending SIGTERM.", Severity.ERROR)
    run.out.append(DumpStacks(run.history.generation))
    run.terminate(event.at_s, Ending(Cause.HANG, text, restart=True), DUMP_WAIT_S)


def on_drain_timeout(run: Run, event: ev.Tick) -> None:
    assert run.ending is not None
    text = f"The worker did not exit within {duration(run.policy.restart.stop_grace_s)}; sending SIGTERM."
    run.say("term", text, Severity.WARNING)
    run.terminate(event.at_s, run.ending, run.policy.restart.term_grace_s)


def on_request_failed(run: Run, event: ev.ActionFailed) -> None:
    """A request did not reach the worker; a signal does."""
    if event.action not in ("RequestStop", "RequestClearCache"):
        return
    ending = run.ending
    if ending is None:  # the request to clear the caches failed: its trip counts now
        assert run.relief is not None
        run.count_trip()
        ending = Ending(run.relief.cause, run.relief.text, restart=True)
    request = "stop" if event.action == "RequestStop" else "clear its caches"
    text = f"Failed to request the worker to {request} ({event.error}); sending SIGTERM."
    run.say("request_failed", text, Severity.WARNING)
    run.terminate(event.at_s, ending, run.policy.restart.stop_grace_s)


def on_term_timeout(run: Run, event: ev.Tick) -> None:
    assert run.ending is not None
    run.say("kill", "The worker ignored SIGTERM; sending SIGKILL to its process group.", Severity.WARNING)
    run.kill(event.at_s, run.ending)


def on_kill_timeout(run: Run, event: ev.Tick) -> None:
    assert run.ending is not None
    if run.kills < KILLS_AT_MOST:
        run.say("kill", "The process group survived SIGKILL; sending it again.", Severity.ERROR)
        run.kills += 1
        run.out.append(Kill(run.history.generation, run.ending.text))
        run.deadline_s = event.at_s + run.policy.restart.kill_wait_s
        return
    text = f"a process of generation {run.history.generation} survived {run.kills} SIGKILLs; restart the machine"
    run.close_generation(event.at_s, "survived SIGKILL", run.ending.cause, alive=True)
    run.survivor = run.history.generation
    run.end(S.FATAL, text)


def on_exited(run: Run, event: ev.Exited) -> None:
    ended = "not started" if run.blocked else _ended(event)
    count_unheard(run, event)
    if event.exit_code == 0 and _all_steps_done(run):
        _completed(run, event.at_s, ended)
        return
    after_exit(run, event.at_s, run.ending or _unrequested_ending(run, event), ended)


def _all_steps_done(run: Run) -> bool:
    """Exit status 0 alone proves nothing: the user's code may have called `sys.exit`."""
    past = run.history
    if run.bye is not None:
        return run.bye.outcome is Outcome.COMPLETED and run.bye.step >= past.target_steps
    return past.durable_step >= past.target_steps > 0  # an extra start is harmless


def _unrequested_ending(run: Run, event: ev.Exited) -> Ending:
    if event.exit_code == 0:
        return Ending(Cause.CRASH, "exited with status 0 before the last step", restart=True)
    reason = run.bye.reason if run.bye else last_line(event.stderr_tail)
    if event.exit_code == EXIT_REFUSED_CODE:
        text = reason.removeprefix("refused: ") or "the worker refused its job without a reason"
        return Ending(Cause.REFUSED, text, restart=False)
    if event.exit_code == EXIT_STOPPED_CODE:
        return Ending(Cause.INTERRUPTED, "the worker was stopped, but not by the supervisor", restart=True)
    sample = run.last_sample
    diagnosis = diagnose(
        event.exit_code,
        event.signal,
        event.stderr_tail,
        oom_killed=event.oom_killed,
        near_limit=sample is not None and sample.footprint_bytes > NEAR_SHARE * run.policy.memory.limit_bytes,
        errors=run.bye.errors if run.bye else (),
    )
    if diagnosis.cause in MEMORY_CAUSES:
        run.count_trip()
    text, advice, crowded = diagnosis.text or _ended(event), diagnosis.advice, False
    use = run.device.use_at_death(run.bye) if diagnosis.cause is Cause.DEVICE_OOM else None
    if use is not None:
        text = f"{use.text}; {text}"
        crowded = use.crowded and run.device.wait.crowd()
        advice = OTHERS if use.crowded else advice
    return Ending(diagnosis.cause, text, True, advice, diagnosis.error_key, crowded=crowded)


def _completed(run: Run, at_s: float, ended: str) -> None:
    run.close_generation(at_s, ended, Cause.COMPLETED)
    if run.bye is not None:
        run.history.weights_sha256 = run.bye.weights_sha256
        run.history.exported_to = run.bye.exported
        run.history.highest_step = max(run.history.highest_step, run.bye.step)
    run.history.completed_digest, run.history.error = run.task_digest, ""
    run.end(S.COMPLETED, ALREADY_COMPLETE if run.was_complete else "all steps done")


def _ended(event: ev.Exited) -> str:
    if event.signal is not None:
        return f"signal {event.signal}"
    return "exit status unknown" if event.exit_code is None else f"exit code {event.exit_code}"
