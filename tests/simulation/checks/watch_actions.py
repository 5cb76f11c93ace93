"""Invariants of the machine's answers, one action at a time. Each rule names what a user would lose."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from tests.simulation.checks.invariant import check
from tests.simulation.checks.shadow import GenerationWatch, Shadow
from tests.simulation.checks.tally import Tally
from tests.simulation.world.deaths import right_causes
from tests.simulation.world.machine import SimulatedRun

from mlx_supervisor.core import actions as ac
from mlx_supervisor.core import events as ev
from mlx_supervisor.core.diagnosis.causes import MEMORY_CAUSES, Cause
from mlx_supervisor.core.history import RunHistory
from mlx_supervisor.core.machine.states import State

if TYPE_CHECKING:
    from tests.simulation.world.world import World

_ORDERS = (
    ac.Kill,
    ac.Terminate,
    ac.RequestStop,
    ac.RequestClearCache,
    ac.RequestResize,
    ac.DumpStacks,
    ac.RequestAutopsy,
)
_ENDS = (ac.Kill, ac.Terminate, ac.RequestStop)
MEMORY_VALUES = frozenset(cause.value for cause in MEMORY_CAUSES)
_CAUSE_VALUES = frozenset(cause.value for cause in Cause)


class ActionWatch:
    """Tracks what the machine must know (`shadow`), and the current generation."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.shadow = Shadow()
        self.tally = Tally(worlds=1)
        self._watched = GenerationWatch()
        self._cause = ""
        self._rebooted_s = 0.0

    def _see(self, action: ac.Action, event: ev.Event, machine: SimulatedRun, actions: list[ac.Action]) -> None:
        kind = type(action)
        if kind is ac.Notice:
            check(action.text and action.kind, "every notice has a text", lambda: f"{action}")  # type: ignore[attr-defined]
            return
        self.tally.actions[kind.__name__] += 1
        if isinstance(action, _ORDERS):
            self._ordered(action, event, machine, actions)
        elif isinstance(action, ac.CloseGeneration):
            self._closed(action, event, machine)
        elif isinstance(action, ac.SaveHistory):
            again, was = RunHistory.restore(json.loads(json.dumps(action.snapshot))), action.snapshot
            same = all(getattr(again, name) == value for name, value in was.items())
            check(same, "a history survives its journal", lambda: f"{again} was {was}")
        elif isinstance(action, ac.Finish):
            self._finished(action, event, machine)
        elif isinstance(action, ac.Spawn):
            self._ordered_spawn(action, event, machine, actions)

    def _ordered(self, action: ac.Action, event: ev.Event, machine: SimulatedRun, actions: list[ac.Action]) -> None:
        """An action for the worker."""
        watched = self._watched
        assert isinstance(action, _ORDERS)
        check(
            action.generation == machine.history.generation == watched.generation and not watched.closed,
            "orders go to the living worker",
            lambda: f"{action}, generation {watched.generation}, closed {watched.closed}",
        )
        if isinstance(action, _ENDS):
            watched.ordered = True
            explained = any(type(each) is ac.Notice for each in actions)
            check(explained, "every kill has a recorded cause", lambda: f"{action} on {event}: no notice")
        if isinstance(action, ac.Kill | ac.RequestStop):
            check(in_words(action.reason), "every kill has a recorded cause", lambda: f"{action}")
        if isinstance(action, ac.RequestAutopsy):
            watched.autopsies += 1
            check(watched.autopsies == 1, "one autopsy per generation", lambda: f"{action}")
        if isinstance(action, ac.RequestResize):
            self._check_size(action.batch_size, machine, growing=True)

    def _ordered_spawn(
        self, action: ac.Spawn, event: ev.Event, machine: SimulatedRun, actions: list[ac.Action]
    ) -> None:
        saved = any(isinstance(each, ac.SaveHistory) and each.wait for each in actions)
        check(saved, "the history is durable before a start", lambda: f"{action}")
        check(self.shadow.request == "run", "a stopped run stays stopped", lambda: f"{action}: {self.shadow}")
        check(self._watched.closed, "one worker at most", lambda: f"{action}, but {self._watched} was not closed")
        if action.batch_size is not None:
            self._check_size(action.batch_size, machine, growing=False)
        every = action.checkpoint_every_steps
        check(every is None or every >= 1, "a checkpoint interval makes sense", lambda: f"{action}")
        policy = self.world.policy.memory.gradient_checkpointing
        check(
            policy != "never" or not action.gradient_checkpointing,
            "gradient checkpointing as allowed",
            lambda: f"{action}",
        )
        cool = not self.shadow.cooling or event.at_s >= self._rebooted_s + self.world.policy.restart.reboot_cooldown_s
        check(cool, "a reboot is cooled down from", lambda: f"{action} on {event}, rebooted at {self._rebooted_s}")
        self.shadow.cooling = False
        self._watched = GenerationWatch(
            action.generation, machine.history.trips, closed=False, durable_before=self.shadow.durable
        )

    def _check_size(self, size: int, machine: SimulatedRun, growing: bool) -> None:
        policy, batch = self.world.policy.batch, machine.batch
        requested = policy.size or batch.requested
        check(
            requested is None or size <= requested,
            "the batch never exceeds the request",
            lambda: f"{size} of {requested}",
        )
        least = min(policy.minimum, requested or size)
        check(size >= least, "the batch is never below the minimum", lambda: f"{size}, at least {least}")
        if growing:
            tripped = self.shadow.tripped
            check(
                all(size < each for each in tripped),
                "never grows onto a size that tripped",
                lambda: f"{size}, {tripped}",
            )
        if requested is not None and policy.size is not None:
            target = requested * policy.accumulation
            effective = target if policy.preserve_effective else max(1, target * size // requested)
            check(
                batch.effective == effective, "the effective batch is kept", lambda: f"{batch.effective}, {effective}"
            )

    def _closed(self, action: ac.CloseGeneration, event: ev.Event, machine: SimulatedRun) -> None:
        watched, cause = self._watched, action.record.get("cause")
        check(cause in _CAUSE_VALUES, "every death has a cause", lambda: f"{action}")
        assert isinstance(cause, str)
        self._cause = cause
        self.tally.causes[cause] += 1
        if isinstance(event, ev.Recovered):
            self.tally.deaths["unseen", cause] += 1
            return
        check(
            action.generation == watched.generation and not watched.closed,
            "a generation ends once",
            lambda: f"{action}, {watched}",
        )
        watched.closed = not action.alive
        tripped = machine.history.trips - watched.trips_before
        check(
            tripped <= 1,
            "no double trip in one generation",
            lambda: f"{tripped} in {watched.generation}",
        )
        check(
            tripped == 0 or cause in (*MEMORY_VALUES, Cause.COMPLETED),
            "a trip is a memory cause",
            lambda: f"tripped, and closed with {cause}",
        )
        if isinstance(event, ev.Exited):
            self._check_cause(cause, event)

    def _check_cause(self, cause: str, event: ev.Exited) -> None:
        dead = self.world.last_dead
        if dead is None or dead.generation != event.generation:  # its start was blocked, and then cancelled
            check(self._watched.ordered, "every death has a cause", lambda: f"{event} without a worker")
            return
        assert dead.death is not None
        self.tally.deaths[dead.death.kind, cause] += 1
        if not self._watched.ordered:
            share = self._watched.footprint_bytes / self.world.policy.memory.limit_bytes
            right = {each.value for each in right_causes(dead.death, share)}
            check(
                cause in right,
                "the cause is the true one",
                lambda: f"{dead.death} was called {cause!r}; right: {right}",
            )

    def _finished(self, action: ac.Finish, event: ev.Event, machine: SimulatedRun) -> None:
        self.tally.outcomes[action.outcome] += 1
        check(in_words(action.reason), "every end has a readable reason", lambda: f"{action}")
        check(machine.reason == action.reason, "every end has a readable reason", lambda: f"{action}, {machine.reason}")
        if action.outcome == "completed":
            disk, target = self.world.host.disk, self.world.target_steps
            check(
                disk.acknowledged >= target,
                "completed means that the last step is durable",
                lambda: f"{disk}, {target}",
            )
        elif action.outcome == "stopped":
            check(
                self.shadow.request != "run",
                "a run that should resume never stays at rest",
                lambda: f"{action}, {self.shadow}",
            )
        else:
            check(machine.state is State.FATAL, "a failed run is in FATAL", lambda: f"{action} in {machine.state}")
            saved = self.shadow.durable > self._watched.durable_before and self._cause != Cause.BLIND.value
            gave_up = "without a new checkpoint" in action.reason and not isinstance(event, ev.Recovered)
            check(
                not (saved and gave_up),
                "never gives up while restarts make progress",
                lambda: f"{action}, {self._watched}",
            )
            dead = self.world.workers[0] if self.world.workers else self.world.last_dead
            if self._cause == Cause.REFUSED.value and dead is not None:
                check(dead.refused, "failed for good only for a reason", lambda: f"{action}, but {dead.death}")


def in_words(text: str) -> bool:
    """Whether the text is readable: not empty, and without a missing value."""
    return bool(text.strip()) and "None" not in text
