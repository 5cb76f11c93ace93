"""How a worker's life ends: hangs, requests, signals, and what an exit means."""

from mlx_supervisor.core import events as ev
from mlx_supervisor.core.actions import (
    DumpStacks,
    Kill,
    Level,
)
from mlx_supervisor.core.diagnosis.causes import Cause, diagnose, last_line
from mlx_supervisor.core.events import Outcome
from mlx_supervisor.core.machine.restarting import NEAR_SHARE, AfterLife
from mlx_supervisor.core.machine.run_state import Ending
from mlx_supervisor.core.machine.states import S

KILLS_AT_MOST = 3
DUMP_WAIT_S = 2.0
EXIT_STOPPED_CODE = 75
EXIT_REFUSED_CODE = 78


class Endings(AfterLife):
    """Handlers of a worker that is being ended, and of its exit."""

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
        self._close_life(event.at_s, "not killable", self._ending.cause, alive=True)
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
        self._after_life(event.at_s, ending, ended)

    def _all_done(self) -> bool:
        """An exit status of 0 alone proves nothing: code of the user's may have called `sys.exit`."""
        past = self.history
        if self._bye is not None:
            return self._bye.outcome is Outcome.COMPLETED and self._bye.step >= past.target_steps
        return past.durable_step >= past.target_steps > 0  # a start too many does no harm

    def _unasked_ending(self, event: ev.Exited) -> Ending:
        if event.exit_code == 0:
            return Ending(Cause.CRASH, "it exited as if all was done, before the last step", restart=True)
        said = self._bye.reason if self._bye else last_line(event.stderr_tail)
        if event.exit_code == EXIT_REFUSED_CODE:
            return Ending(Cause.REFUSED, said.removeprefix("refused: ") or "no reason given", restart=False)
        if event.exit_code == EXIT_STOPPED_CODE:
            return Ending(Cause.INTERRUPTED, "somebody else told the worker to stop", restart=True)
        why = diagnose(
            event.exit_code,
            event.signal,
            event.stderr_tail,
            oom_killed=event.oom_killed,
            near_limit=self._near_limit(),
            bye_reason=self._bye.reason if self._bye else "",
        )
        if why.memory:
            self.history.trips += 1
            self.breaker.open()
        return Ending(why.cause, why.text or _ended(event), restart=True, advice=why.advice, error_key=why.error_key)

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


def _ended(event: ev.Exited) -> str:
    if event.signal is not None:
        return f"signal {event.signal}"
    if event.exit_code is None:
        return "gone"
    return f"exit code {event.exit_code}"
