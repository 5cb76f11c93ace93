"""The state of one run, and the transitions that the handlers share."""

from dataclasses import dataclass
from typing import Any

from mlx_supervisor.core import actions as act
from mlx_supervisor.core import events as ev
from mlx_supervisor.core.diagnosis.causes import Cause
from mlx_supervisor.core.history import Generation, RunHistory
from mlx_supervisor.core.machine.heartbeat import Heartbeat
from mlx_supervisor.core.machine.states import AT_REST, S, State
from mlx_supervisor.core.memory.breaker import Breaker, BreakerState, Trip
from mlx_supervisor.core.memory.device import DeviceAccount
from mlx_supervisor.core.memory.memory_wait import MemoryWait
from mlx_supervisor.core.policy import RunPolicy
from mlx_supervisor.core.rate import Rate
from mlx_supervisor.core.restart.batch import BatchPlan
from mlx_supervisor.core.restart.budget import RestartBudget
from mlx_supervisor.core.restart.escalation import checkpoints_gradients
from mlx_supervisor.core.restart.update_growth import UpdateGrowth

RESTED = {"completed": State.COMPLETED, "failed": State.FATAL}
"""The state of a run whose history has an outcome."""
REASON_LIMIT_CHARS = 300
ALREADY_COMPLETE = "already complete; nothing was trained"
ACTIVITIES = {
    S.WAITING: "waiting for memory",
    S.BACKOFF: "waiting to restart",
    S.STARTING: "loading the model",
    S.RELIEVING: "clearing the caches",
    S.DRAINING: "saving a checkpoint to stop",
    S.TERMINATING: "stopping the worker",
    S.KILLING: "killing the worker",
    S.FATAL: "failed",
}
"""What a run does in a state, for people; while it runs, its worker's phase says more."""
PHASES = {ev.Phase.EVAL: "evaluating", ev.Phase.CHECKPOINT: "saving a checkpoint"}
TRAINS = "training"
WAITS_FOR_DISK = "waiting for disk"


@dataclass(frozen=True, slots=True)
class Ending:
    """Why the supervisor ends the current generation. `requested_by`: the request to stop the run, "" for none.

    `crowded`: other processes took the device's memory, so that a smaller batch would not help.
    """

    cause: Cause
    text: str
    restart: bool
    advice: str = ""
    error_key: str = ""
    requested_by: str = ""
    crowded: bool = False

    @property
    def waits(self) -> bool:
        """Whether the worker may wait for the disk with what it has trained: no person waits for its end."""
        return self.restart and self.cause is not Cause.REQUESTED


class Run:
    """State, bookkeeping and the transitions that handlers share. `seed`: a number of the run's own, for jitter."""

    def __init__(self, policy: RunPolicy, history: RunHistory | None = None, seed: int = 0) -> None:
        self.policy = policy
        self.history = history or RunHistory()
        self.state = RESTED.get(self.history.outcome, State.STOPPED)
        self.breaker = Breaker(policy.memory, policy.restart.close_after_steps)
        self.device = DeviceAccount(policy.memory, policy.restart.close_after_steps)
        self.current: Generation | None = None
        self.last_sample: ev.Sample | None = None
        self.last_step: ev.StepReport | None = None
        self.growth = UpdateGrowth()
        self.phase = ev.Phase.LOAD
        self.activity: str = self.state.value
        self.activity_since_s = 0.0
        self.rate = Rate()
        past, self.reason = self.history, self.history.reason
        past.forget_trips_below(policy.memory.limit_bytes)
        self.batch = BatchPlan(
            policy.batch, past.batch_size, frozenset(past.tripped_sizes), past.leak_from, past.requested_size
        )
        if past.requested_size is not None and past.requested_effective is not None:
            self.batch.adopt(past.requested_size, past.requested_effective)
        self.budget = RestartBudget(policy.restart, past, seed)
        self.memory = MemoryWait(policy.memory.limit_bytes)
        if past.breaker_open:
            self.breaker.open()
        self.heartbeat = Heartbeat(policy.restart.hang_timeout_s)
        self.deadline_s: float | None = None
        self.ending: Ending | None = None
        self.bye: ev.Bye | None = None
        self.relief: Trip | None = None
        self.cleared = False
        self.missing = 0
        self.kills = 0
        self.unready_trips = 0
        self.need_bytes = 0
        self.rested: dict[str, Any] | None = None
        """What a refused start restores in the history; None once a generation since the start has made an update."""
        self.task_digest = ""
        """Of what the next generation trains with, "" if unknown; the adapter sets it before each start."""
        self.autopsy_requested = self.autopsy_due = False
        self.advised = self.found = ""
        self.cool_until_s: float | None = None
        self.counted_until_s: float | None = None
        self.survivor: int | None = None
        """A generation whose worker survived SIGKILL: starts are blocked until it exits."""
        self.suspending = False
        self.failed_checkpoints = 0
        self.waiting_for = ""
        """What a worker that has made all steps, or must end, lacks to save or export its work; "" if nothing."""
        self.blocked = ""
        """Why the start waits for another process that holds the run's folder; "" if it does not."""
        self.drain_extended = False
        self.out: list[act.Action] = []
        self.allowed: tuple[State, ...] = ()

    @property
    def stopping(self) -> bool:
        """Whether the current generation is ending with no restart after it."""
        return self.ending is not None and not self.ending.restart

    @property
    def was_complete(self) -> bool:
        """Whether the run was completed before its latest start, and no later generation has made an update."""
        trained = self.current is not None and self.current.first_step is not None
        return self.rested is not None and self.rested["outcome"] == "completed" and not trained

    @property
    def checkpoints_gradients(self) -> bool:
        """Whether the current worker, or else the next, recomputes activations instead of keeping them."""
        if self.current is None or self.state in AT_REST:
            return checkpoints_gradients(self.policy, self.history)
        return self.current.gradient_checkpointing

    def note_activity(self, at_s: float) -> None:
        """Update what the run is doing, for people, and since when; called after every event."""
        now = self._activity()
        if now != self.activity:
            self.activity, self.activity_since_s = now, at_s

    def _activity(self) -> str:
        if self.state is S.STARTING and self.blocked:
            return "waiting for another process to end"
        if self.state is S.DRAINING and self.waiting_for:
            return WAITS_FOR_DISK
        if self.state is not S.RUNNING:
            return ACTIVITIES.get(self.state, self.state.value)
        if self.waiting_for:
            return WAITS_FOR_DISK
        return PHASES.get(self.phase) or (TRAINS if self.last_step else "compiling the first update")

    def next_deadline(self) -> float | None:
        """When a `Tick` is due, in seconds of the events' clock; None without a deadline."""
        if self.state is S.RUNNING:
            return self.heartbeat.deadline_s
        return self.deadline_s

    def go(self, state: State, deadline_s: float | None = None) -> None:
        assert state in self.allowed, f"the table has no transition from {self.state} to {state}"
        self.state = state
        self.deadline_s = deadline_s

    def say(
        self,
        kind: str,
        text: str,
        severity: act.Severity = act.Severity.INFO,
        *,
        quiet: bool = False,
        **fields: act.Field,
    ) -> None:
        self.out.append(act.Notice(kind, text, severity, self.history.generation, fields, quiet))

    def save(self, wait: bool = True) -> None:
        self.out.append(act.SaveHistory(self.snapshot(), wait))

    def snapshot(self) -> dict[str, Any]:
        """The history as it is to be saved now."""
        past = self.history
        past.batch_size, past.requested_size = self.batch.size, self.batch.requested
        past.requested_effective = self.batch.requested_effective
        past.tripped_sizes = sorted(self.batch.tripped)
        past.leak_from = self.batch.leak_from
        past.breaker_open = self.breaker.state is not BreakerState.CLOSED
        if not past.refused:
            past.reason = self.reason
        return past.snapshot()

    def drain(self, at_s: float, ending: Ending) -> None:
        self.ending = ending
        self.drain_extended = False
        self.out.append(act.RequestStop(self.history.generation, ending.text[:REASON_LIMIT_CHARS], ending.waits))
        self.go(S.DRAINING, at_s + self.policy.restart.stop_grace_s)

    def terminate(self, at_s: float, ending: Ending, grace_s: float) -> None:
        self.ending = ending
        self.out.append(act.Terminate(self.history.generation))
        self.go(S.TERMINATING, at_s + grace_s)

    def kill(self, at_s: float, ending: Ending) -> None:
        self.ending = ending
        self.kills += 1
        self.out.append(act.Kill(self.history.generation, ending.text))
        self.go(S.KILLING, at_s + self.policy.restart.kill_wait_s)

    def count_trip(self) -> None:
        self.history.trips += 1
        self.breaker.open()

    def close_generation(self, at_s: float, ended: str, cause: Cause, alive: bool = False) -> None:
        if self.current is not None:
            record = self.current.record(at_s, ended, cause.value)
            self.out.append(act.CloseGeneration(self.current.generation, record, alive))

    def end(self, state: State, reason: str, head: str = "") -> None:
        self.go(state)
        self.finish(reason, head)

    def refuse(self, reason: str) -> None:
        """The start failed before its first update: a run that had made some keeps its outcome and its reason."""
        past, step = self.history, self.history.highest_step
        head = f"Not resumed at step {step}" if step else "Not started"
        if self.rested is None or step == 0:
            self.end(S.FATAL, reason, head)
            return
        self.go(S.FATAL)
        self.reason = past.refused = reason
        for name, value in self.rested.items():
            setattr(past, name, value)
        past.unfinished, past.stop_requested = False, ""
        self._publish("failed", reason, head)

    def finish(self, reason: str, head: str = "") -> None:
        """Publish the outcome. `head`: how the notice begins, by default the outcome and the step."""
        outcome = {S.COMPLETED: "completed", S.STOPPED: "stopped", S.FATAL: "failed"}[self.state]
        self.history.outcome = outcome
        self.history.unfinished = self.suspending and self.state is S.STOPPED
        self.history.stop_requested = ""
        self.reason = reason
        self._publish(outcome, reason, head)

    def _publish(self, outcome: str, reason: str, head: str) -> None:
        severity = act.Severity.ERROR if self.state is S.FATAL else act.Severity.INFO
        step = self.history.highest_step
        where = head or f"{outcome.capitalize()} {f'at step {step}' if step else 'before the first step'}"
        text = f"{where}: {reason}{'' if reason.endswith(('.', '?')) else '.'}"
        self.say("finish", text, severity, quiet=not head)  # without `head`, a summary follows and says it
        self.save()
        self.out.append(act.Finish(outcome, reason))
