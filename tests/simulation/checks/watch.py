"""Invariants that must hold after every event. Each rule names what a user would lose."""

from __future__ import annotations

import json
from math import isfinite
from typing import TYPE_CHECKING

from tests.simulation.checks.invariant import InvariantError, check
from tests.simulation.checks.shadow import GenerationWatch, Shadow
from tests.simulation.checks.timeline import EventTimeline
from tests.simulation.checks.watch_actions import MEMORY_VALUES, ActionWatch, in_words
from tests.simulation.world.machine import SimulatedRun
from tests.simulation.world.weight import weight

from mlx_supervisor.core import actions as ac
from mlx_supervisor.core import events as ev
from mlx_supervisor.core.diagnosis.causes import Cause
from mlx_supervisor.core.events import CommandKind
from mlx_supervisor.core.history import RunHistory
from mlx_supervisor.core.machine.states import AT_REST, State
from mlx_supervisor.core.machine.table import TABLE
from mlx_supervisor.core.restart.external import HOURS_AT_MOST

if TYPE_CHECKING:
    from tests.simulation.world.journal import OpenGeneration
    from tests.simulation.world.supervisor import SimulatedSupervisor
    from tests.simulation.world.worker import SimulatedWorker
    from tests.simulation.world.world import World

AUTOSTART = "autostart"
"""Reason of a start that no person requested."""
ROUND_TRIP_EVERY = 16
WEIGH_EVERY = 500
OBJECTS_AT_MOST = 5_000
"""In all containers of a machine: they must not grow with the length of a run."""
SHRINKS_AT_MOST = 5
"""Halvings from the largest batch drawn to the smallest, and gradient checkpointing after that."""
_LEAK = Cause.LEAK.value


class Watch(ActionWatch):
    """Stands between the supervisor and its machine; checks every event and answer."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self.events = 0
        self.timeline: EventTimeline | None = None
        self.newest_generation = 0
        self._exempt = self._without_progress = self._acknowledged = 0
        self._events_at_most: int | None = None
        self._event = ""

    # ---- every event

    def apply(self, supervisor: SimulatedSupervisor, event: ev.Event) -> list[ac.Action]:
        """The machine's answer, checked."""
        machine = supervisor.machine
        before, size, deadline_s = machine.state, machine.batch.size, machine.next_deadline()
        handled = type(event) in TABLE[before] and (
            not isinstance(event, ev.WorkerEvent) or event.generation == machine.history.generation
        )
        stale = isinstance(event, ev.WorkerEvent) and event.generation < machine.history.generation
        stale = stale and not isinstance(event, ev.Recovered)
        known = machine.history.snapshot() if stale else None
        self.events += 1
        self._event = type(event).__name__
        try:
            actions = machine.apply(event)
        except Exception as error:
            raise InvariantError("never raises", f"{type(error).__name__}: {error} on {event} in {before}") from error
        after = machine.state
        if self.timeline is not None:
            self.timeline.note(self.events, event, before.value, after.value, actions)
        if handled:
            self.tally.handled[before, self._event] += 1
            self._track(event, before)
        for action in actions:
            self._see(action, event, machine, actions)
        if stale:
            unchanged = (actions, after, machine.history.snapshot()) == ([], before, known)
            check(unchanged, "older generations are ignored", lambda: f"{event} in {before} was not")
        if handled:
            self._check_answer(event, before, machine, deadline_s)
        self._check_batch(machine, size, actions)
        self._check_always(machine)
        return actions

    def _track(self, event: ev.Event, state: State) -> None:
        """Before the answer: track what the machine must know now."""
        kind = type(event)
        watched, shadow = self._watched, self.shadow
        if kind is ev.Sample:
            watched.missing = 0
            watched.footprint_bytes = event.footprint_bytes  # type: ignore[attr-defined]
            over = watched.footprint_bytes > self.world.policy.memory.limit_bytes
            watched.over_limit = watched.over_limit + 1 if over else 0
        elif kind is ev.SampleMissing:
            watched.missing += 1
        elif kind is ev.Ready or (kind is ev.CheckpointReport and event.ok):  # type: ignore[attr-defined]
            shadow.durable = max(shadow.durable, event.step)  # type: ignore[attr-defined]
        elif kind is ev.Exited and event.last_step:  # type: ignore[attr-defined]
            shadow.durable = max(shadow.durable, event.durable_step)  # type: ignore[attr-defined]
        elif kind is ev.Recovered and event.machine_restarted:  # type: ignore[attr-defined]
            shadow.cooling, self._rebooted_s = True, event.at_s
        elif isinstance(event, ev.Command):
            if event.kind in (CommandKind.START, CommandKind.RESTART):
                shadow.request = "run"
                shadow.cooling &= event.reason == AUTOSTART
                self._exempt += self._without_progress
            elif event.kind is CommandKind.SUSPEND:
                shadow.request = "suspend"
            elif not (event.kind is CommandKind.KILL and shadow.request == "suspend"):
                shadow.request = "stop"

    # ---- after the answer

    def _check_batch(self, machine: SimulatedRun, before: int | None, actions: list[ac.Action]) -> None:
        after = machine.batch.size
        if before is None or after is None or after == before:
            return
        if after < before:
            ended = any(type(each) is ac.CloseGeneration for each in actions)
            check(
                ended and self._cause in MEMORY_VALUES,
                "only memory halves",
                lambda: f"{before} to {after}: {self._cause}",
            )
            halves = self._cause != _LEAK or self.world.policy.batch.halve_on_leak
            check(halves, "only memory halves", lambda: f"{before} to {after} for a leak, which must not halve")
            if self._cause != _LEAK:
                self.shadow.tripped |= {before}
        else:
            if machine.history.leak_kept and self.world.faults.leak_mib:  # a real leak, which halving did not slow
                self.shadow.tripped = frozenset(each for each in self.shadow.tripped if each > after)
            self._check_size(after, machine, growing=True)

    def _check_answer(self, event: ev.Event, before: State, machine: SimulatedRun, deadline_s: float | None) -> None:
        kind, after, memory = type(event), machine.state, self.world.policy.memory
        if kind is ev.Sample and self._watched.over_limit >= memory.confirm_samples:
            check(after is State.KILLING, "over the limit means killed", lambda: f"{self._watched}, {after}")
        elif kind is ev.SampleMissing and self._watched.missing >= memory.missing_samples:
            check(
                after not in (State.STARTING, State.RUNNING),
                "never left unwatched",
                lambda: f"{self._watched}, {after}",
            )
        elif kind is ev.Exited and before not in AT_REST:
            new = self._watched.generation > event.generation  # type: ignore[attr-defined]
            check(
                self._watched.closed or new,
                "every death has a cause",
                lambda: f"{event} left {self._watched} open",
            )
        elif kind is ev.Tick and deadline_s is not None and event.at_s >= deadline_s:
            now = (after, machine.next_deadline(), self._watched.generation)
            check(now[:2] != (before, deadline_s), "a deadline leads somewhere", lambda: f"{event}: {now}")

    def _check_always(self, machine: SimulatedRun) -> None:
        deadline_s, rests, past = machine.next_deadline(), machine.state in AT_REST, machine.history
        if (deadline_s is None) != rests or (deadline_s is not None and not isfinite(deadline_s)):
            raise InvariantError("every state that waits has a deadline", f"{deadline_s} in {machine.state}")
        if past.durable_step < self.shadow.durable:
            raise InvariantError(
                "an acknowledged step is never lost", f"knows {past.durable_step}, reported was {self.shadow.durable}"
            )
        if past.durable_step > self.world.host.disk.newest:
            raise InvariantError(
                "never knows of a step that does not exist", f"{past.durable_step}, {self.world.host.disk}"
            )
        if past.trips - self._watched.trips_before > 1:
            raise InvariantError("no double trip in one generation", f"{past.trips}, {self._watched}")
        if machine.state is State.FATAL and not in_words(machine.reason):
            raise InvariantError("every end has a readable reason", f"{machine.reason!r}")
        if self.events % ROUND_TRIP_EVERY == 0:
            again = RunHistory.restore(json.loads(json.dumps(past.snapshot())))
            check(again == past, "a history survives its journal", lambda: f"{again} was {past}")
        if self.events % WEIGH_EVERY == 0:
            check(weight(machine) <= OBJECTS_AT_MOST, "a machine is bounded", lambda: f"{weight(machine)} objects")
        if self._events_at_most is not None and self.events > self._events_at_most:
            raise InvariantError("liveness", f"no end in a healed world: {machine.state}, {past}")

    # ---- reports by the world

    def opened(self, generation: int) -> None:
        """A generation was opened in the journal and is about to start."""
        newest = self.newest_generation
        check(generation > newest, "generation numbers only grow", lambda: f"{generation} after {newest}")
        self.newest_generation = generation

    def spawned(self, action: ac.Spawn) -> None:
        """A worker is about to start."""
        world = self.world
        check(
            not world.workers,
            "one worker at most",
            lambda: f"{action}, but generation {world.workers[0].generation} is alive",
        )
        self.tally.spawns += 1
        acknowledged, policy = world.host.disk.acknowledged, world.policy.restart
        self._without_progress = 0 if acknowledged > self._acknowledged else self._without_progress + 1
        self._exempt = 0 if acknowledged > self._acknowledged else self._exempt
        self._acknowledged = acknowledged
        limit = policy.max_without_progress + policy.max_memory_without_progress + policy.max_reboots + SHRINKS_AT_MOST
        limit += HOURS_AT_MOST * policy.max_external
        check(
            self._without_progress - self._exempt <= limit + 1,
            "restarts without progress are bounded",
            lambda: (
                f"{self._without_progress} starts since step {acknowledged} became durable, {self._exempt} on request"
            ),
        )

    def resumed(self, worker: SimulatedWorker) -> None:
        """A worker has loaded its checkpoint."""
        disk = self.world.host.disk
        check(worker.step >= disk.acknowledged, "an acknowledged step is never lost", lambda: f"{worker.step}, {disk}")
        disk.flush(worker.step)

    def supervisor_died(self) -> None:
        """What was not saved may be lost."""
        self.tally.supervisors += 1
        saved = self.world.journal.shadow
        self.shadow = saved.copy() if isinstance(saved, Shadow) else Shadow()
        self._exempt += 1

    def note_arrows(self, machine: SimulatedRun) -> None:
        """Count every transition."""
        go, arrows = machine.go, self.tally.arrows

        def noted(state: State, deadline_s: float | None = None) -> None:
            arrows[machine.state, self._event, state] += 1
            go(state, deadline_s)

        machine.go = noted  # type: ignore[method-assign]

    def restored(self, machine: SimulatedRun) -> None:
        """A new machine was restored from the journal."""
        past, request = machine.history, self.shadow.request
        self._watched = GenerationWatch(past.generation, past.trips)
        self._rebooted_s = min(self._rebooted_s, self.world.clock.now_s)  # another boot's clock begins anew
        self._check_always(machine)
        if past.outcome in ("completed", "failed") or past.refused:  # a refused start leaves the outcome as it was
            return
        check(
            past.unfinished or request not in ("run", "suspend"),
            "a run that should resume never stays at rest",
            lambda: f"{past}, {request}",
        )

    def recovered_generation(self, left: OpenGeneration) -> None:
        """No worker of the dead supervisor is alive."""
        workers = self.world.workers
        check(not workers, "one worker at most", lambda: f"{left} was recovered, but {workers[0].generation} is alive")

    def healing_begins(self, events: int) -> None:
        """From now on the run must complete."""
        self._events_at_most = self.events + events

    def stuck(self) -> str:
        """Why the world has stopped making progress."""
        machine = self.world.supervisor.machine
        return f"nothing will happen again in {machine.state}: {machine.history}"

    def at_end(self) -> None:
        """The run has completed."""
        machine = self.world.supervisor.machine
        check(machine.state is State.COMPLETED, "liveness", lambda: f"{machine.state}: {machine.reason}")
        self.tally.events = self.events
