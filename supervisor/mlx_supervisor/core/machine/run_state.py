"""What every handler of the machine stands on: the run's state, its bookkeeping, and the moves between states."""

from dataclasses import dataclass

from mlx_supervisor.core import events as ev
from mlx_supervisor.core.actions import (
    Action,
    CloseGeneration,
    Field,
    Finish,
    Kill,
    Level,
    Persist,
    RequestStop,
    SaveHistory,
    Terminate,
)
from mlx_supervisor.core.diagnosis.causes import Cause
from mlx_supervisor.core.events import CommandKind
from mlx_supervisor.core.history import Life, RunHistory
from mlx_supervisor.core.machine.heartbeat import Heartbeat
from mlx_supervisor.core.machine.states import AT_REST, S, State
from mlx_supervisor.core.machine.table import TABLE
from mlx_supervisor.core.memory.breaker import Breaker, BreakerState, Trip
from mlx_supervisor.core.memory.memory_wait import MemoryWait
from mlx_supervisor.core.policy import RunPolicy
from mlx_supervisor.core.restart.batch import BatchPlan
from mlx_supervisor.core.restart.budget import RestartBudget
from mlx_supervisor.core.restart.escalation import checkpoints_gradients

RESTED = {"completed": State.COMPLETED, "failed": State.FATAL}
"""Where a run stands whose history says how it ended."""
REASON_LIMIT_CHARS = 300


@dataclass(frozen=True, slots=True)
class Ending:
    """Why the present life is being ended, by us. `asked`: who wants no other after it, "" while nobody does."""

    cause: Cause
    text: str
    restart: bool
    advice: str = ""
    error_key: str = ""
    asked: str = ""


class MachineBase:
    """State, bookkeeping and the moves that handlers share. `seed`: a number of the run's own, for jitter."""

    def __init__(self, policy: RunPolicy, history: RunHistory | None = None, seed: int = 0) -> None:
        self.policy = policy
        self.history = history or RunHistory()
        self.state = RESTED.get(self.history.outcome, State.STOPPED)
        self.breaker = Breaker(policy.memory, policy.restart.close_after_steps)
        self.life: Life | None = None
        self.last_sample: ev.Sample | None = None
        self.last_step: ev.StepReport | None = None
        self.reason = self.history.reason
        past = self.history
        past.forget_trips_below(policy.memory.limit_bytes)
        self.batch = BatchPlan(policy.batch, past.batch_size, frozenset(past.tripped_sizes), past.leak_from)
        if past.asked_size is not None and past.asked_effective is not None:
            self.batch.adopt(past.asked_size, past.asked_effective)
        self._budget = RestartBudget(policy.restart, past, seed)
        self._memory = MemoryWait(policy.memory.limit_bytes)
        if past.breaker_open:
            self.breaker.open()
        self._heartbeat = Heartbeat(policy.restart.hang_timeout_s)
        self._deadline_s: float | None = None
        self._ending: Ending | None = None
        self._bye: ev.Bye | None = None
        self._relief: Trip | None = None
        self._cleared = False
        self._missing = 0
        self._kills = 0
        self._unready_trips = 0
        self._need_bytes = 0
        self._autopsy_asked = self._autopsy_due = False
        self._cool_until_s: float | None = None
        self._accounted_s: float | None = None
        self._survivor: int | None = None
        self._suspending = False
        self._drain_extended = False
        self._out: list[Action] = []
        self._allowed: tuple[State, ...] = ()

    # ---- the interface

    def apply(self, event: ev.Event) -> list[Action]:
        """What is to be done about `event`."""
        self._out = []
        rule = TABLE[self.state].get(type(event))
        stale = isinstance(event, ev.WorkerEvent) and event.generation != self.history.generation
        stale = stale and not isinstance(event, ev.Recovered)
        if rule is None or stale or (isinstance(event, ev.Tick) and not self._due(event.at_s)):
            return []
        self._account(event.at_s)
        if isinstance(event, ev.Command):
            hurried = self._suspending and event.kind is CommandKind.KILL
            self._suspending = event.kind is CommandKind.SUSPEND or hurried
        handler, self._allowed = rule
        getattr(self, handler)(event)
        return self._out

    @property
    def stopping(self) -> bool:
        """Whether the present life is being ended for good, as somebody asked."""
        return self._ending is not None and not self._ending.restart

    def refuse_starts(self, generation: int) -> None:
        """A worker of this generation is still there and can't be ended: no other may start beside it."""
        self._survivor = generation

    @property
    def checkpoints_gradients(self) -> bool:
        """Whether activations are computed again instead of kept: by the worker that is there, else by the next."""
        if self.life is None or self.state in AT_REST:
            return checkpoints_gradients(self.policy, self.history)
        return self.life.gradient_checkpointing

    def next_deadline(self) -> float | None:
        """When a `Tick` is wanted, in seconds of the events' clock; None when nothing is waited for."""
        if self.state is S.RUNNING:
            return self._heartbeat.deadline_s
        return self._deadline_s

    # ---- helpers

    def _due(self, at_s: float) -> bool:
        deadline_s = self.next_deadline()
        return deadline_s is not None and at_s >= deadline_s

    def _go(self, state: State, deadline_s: float | None = None) -> None:
        assert state in self._allowed, f"the table has no way from {self.state} to {state}"
        self.state = state
        self._deadline_s = deadline_s

    def _account(self, at_s: float) -> None:
        if self._accounted_s is not None and self.state not in AT_REST:
            self.history.add_active(max(at_s - self._accounted_s, 0.0))
        self._accounted_s = max(at_s, self._accounted_s or at_s)

    def _say(self, kind: str, text: str, level: Level = Level.INFO, **fields: Field) -> None:
        self._out.append(Persist(kind, text, level, self.history.generation, fields))

    def _save(self, wait: bool = True) -> None:
        past = self.history
        past.batch_size, past.asked_size = self.batch.size, self.batch.asked
        past.asked_effective = self.batch.asked_effective
        past.tripped_sizes = sorted(self.batch.tripped)
        past.leak_from = self.batch.leak_from
        past.breaker_open = self.breaker.state is not BreakerState.CLOSED
        past.reason = self.reason
        self._out.append(SaveHistory(past.snapshot(), wait))

    def _drain(self, at_s: float, ending: Ending) -> None:
        self._ending = ending
        self._drain_extended = False
        self._out.append(RequestStop(self.history.generation, ending.text[:REASON_LIMIT_CHARS]))
        self._go(S.DRAINING, at_s + self.policy.restart.stop_grace_s)

    def _terminate(self, at_s: float, ending: Ending, grace_s: float) -> None:
        self._ending = ending
        self._out.append(Terminate(self.history.generation))
        self._go(S.TERMINATING, at_s + grace_s)

    def _kill(self, at_s: float, ending: Ending) -> None:
        self._ending = ending
        self._kills += 1
        self._out.append(Kill(self.history.generation, ending.text))
        self._go(S.KILLING, at_s + self.policy.restart.kill_wait_s)

    def _count_trip(self, trip: Trip) -> None:
        self.history.trips += 1
        self.breaker.open()

    def _close_life(self, at_s: float, ended: str, cause: Cause, alive: bool = False) -> None:
        if self.life is not None:
            record = self.life.record(at_s, ended, cause.value)
            self._out.append(CloseGeneration(self.life.generation, record, alive))

    def _finish(self, state: State, reason: str) -> None:
        outcome = {S.COMPLETED: "completed", S.STOPPED: "stopped", S.FATAL: "failed"}[state]
        self.history.outcome = outcome
        self.history.wanted = self._suspending and state is S.STOPPED
        self.reason = reason
        level = Level.ERROR if state is S.FATAL else Level.INFO
        self._say("finish", f"{outcome.capitalize()} at step {self.history.highest_step}: {reason}.", level)
        self._save()
        self._out.append(Finish(outcome, reason))
