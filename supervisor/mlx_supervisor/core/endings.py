"""How a worker's life ends: hangs, requests, signals, and what follows from an exit."""

from mlx_supervisor.core import events as ev
from mlx_supervisor.core.actions import (
    DumpStacks,
    Kill,
    Level,
)
from mlx_supervisor.core.causes import MEMORY_CAUSES, Cause, cause_of_exit, last_line
from mlx_supervisor.core.events import Outcome
from mlx_supervisor.core.history import Life
from mlx_supervisor.core.machine_base import Ending, MachineBase
from mlx_supervisor.core.policy import MIB
from mlx_supervisor.core.table import S

KILLS_AT_MOST = 3
DUMP_WAIT_S = 2.0
NEAR_SHARE = 0.85
"""Share of the limit above which a death that nobody explains is put down to memory."""
EXIT_STOPPED_CODE = 75
EXIT_REFUSED_CODE = 78


class Endings(MachineBase):
    """Handlers of a worker that is being ended, and of a life that is over."""

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
        self._close_life(event.at_s, "not killable", self._ending.cause)
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
        self._after_life(event.at_s, ending.cause, ending.text, ended, ending.restart)

    def _all_done(self) -> bool:
        """An exit status of 0 alone proves nothing: code of the user's may have called `sys.exit`."""
        past = self.history
        if self._bye is not None:
            return self._bye.outcome is Outcome.COMPLETED and self._bye.step >= past.target_steps
        return max(past.highest_step, past.durable_step) >= past.target_steps > 0

    def _unasked_ending(self, event: ev.Exited) -> Ending:
        if event.exit_code == 0:
            return Ending(Cause.CRASH, "it exited as if all was done, before the last step", restart=True)
        said = self._bye.reason if self._bye else last_line(event.stderr_tail)
        if event.exit_code == EXIT_REFUSED_CODE:
            return Ending(Cause.REFUSED, said.removeprefix("refused: ") or "no reason given", restart=False)
        if event.exit_code == EXIT_STOPPED_CODE:
            return Ending(Cause.INTERRUPTED, "somebody else told the worker to stop", restart=True)
        near = self._near_limit()
        cause = cause_of_exit(
            event.exit_code, event.signal, event.stderr_tail, oom_killed=event.oom_killed, near_limit=near
        )
        if cause in MEMORY_CAUSES:
            self.history.trips += 1
            self.breaker.open()
        return Ending(cause, said or _ended(event), restart=True)

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

    def _after_life(self, at_s: float, cause: Cause, text: str, ended: str, restart: bool = True) -> None:
        """Name the cause, decide what changes, and whether there is another life."""
        life, past = self.life, self.history
        assert life is not None
        if self._bye is not None:
            past.weights_sha256 = self._bye.weights_sha256
        past.failures += self._lost_work(cause)
        saved = past.durable_step > life.durable_before
        progress = saved and cause is not Cause.BLIND
        self._close_life(at_s, ended, cause)
        size = self.batch.size
        shrunk = cause in MEMORY_CAUSES and self.batch.halve(for_pressure=cause is not Cause.LEAK)
        if not restart:
            self._come_to_rest(cause, text)
            return
        hopeless = self._hopeless(cause, shrunk)
        if hopeless is not None:
            self._go(S.FATAL)
            self._finish(S.FATAL, hopeless)
            return
        past.tighter_steps = self._tighter(life, saved)
        if cause is Cause.ASKED:
            self._budget.barren_lives = 0
        elif not self._budget.life_ended(progress=progress, shrunk=shrunk):
            self._go(S.FATAL)
            self._finish(S.FATAL, f"{self._budget.barren_lives} lives in a row saved nothing new; the last: {text}")
            return
        what = f"The worker ended ({ended}): {cause.value}"
        change = f"; the batch goes from {size} to {self.batch.size}" if shrunk else ""
        delay_s = self._budget.delay_s(cause, progress=progress, shrunk=shrunk)
        wait = f"; next start in {delay_s:.0f} s" if delay_s else "; it is started again"
        self._say("restart", f"{what}{change}{wait}.", Level.WARNING, cause=cause.value, batch_size=self.batch.size)
        if delay_s:
            self._go(S.BACKOFF, at_s + delay_s)
            self._save()
        else:
            self._spawn(at_s)

    def _lost_work(self, cause: Cause) -> bool:
        """Whether what ended the life could cost updates: not when it had made none, or could save the last."""
        trained = self.life is not None and self.life.first_step is not None
        orderly = self._bye is not None and self._bye.outcome is Outcome.STOPPED
        return trained and cause not in (Cause.ASKED, Cause.REFUSED) and not orderly

    def _hopeless(self, cause: Cause, shrunk: bool) -> str | None:
        """A limit that the very first steps can't keep: say so at once instead of trying again and again."""
        if cause not in MEMORY_CAUSES or self.history.highest_step > 0 or self.life is None:
            return None
        before_ready = self.history.target_steps == 0
        by_our_limit = self.life.peak_footprint_bytes > NEAR_SHARE * self.policy.memory.limit_bytes
        if (shrunk and not before_ready) or not by_our_limit:
            return None
        peak = self.life.peak_footprint_bytes / MIB
        limit = self.policy.memory.limit_bytes / MIB
        where = "before the model was loaded" if before_ready else f"before the first step at batch {self.batch.size}"
        return (
            f"the limit of {limit:,.0f} MiB is below what this run needs: it reached {peak:,.0f} MiB {where}; "
            f"raise memory.limit or choose a smaller model"
        )

    def _tighter(self, life: Life, saved: bool) -> int | None:
        """A life that ended before its first checkpoint: let the next one save sooner."""
        if saved or life.first_step is None or life.last_step is None:
            return self.history.tighter_steps
        half = max(1, (life.last_step - life.first_step + 1) // 2)
        return min(half, self.history.tighter_steps or half)

    def _come_to_rest(self, cause: Cause, text: str) -> None:
        state = S.FATAL if cause is Cause.REFUSED else S.STOPPED
        self._go(state)
        self._finish(state, text)

    def _on_backoff_over(self, event: ev.Tick) -> None:
        self._spawn(event.at_s)


def _ended(event: ev.Exited) -> str:
    if event.signal is not None:
        return f"signal {event.signal}"
    if event.exit_code is None:
        return "gone"
    return f"exit code {event.exit_code}"
