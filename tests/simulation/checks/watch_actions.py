"""What must hold of the machine's answers, one action at a time. Each rule names what a user would lose."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from tests.simulation.checks.invariant import check
from tests.simulation.checks.shadow import LifeWatch, Shadow
from tests.simulation.checks.tally import Tally
from tests.simulation.world.deaths import right_causes
from tests.simulation.world.machine import Machine

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
    """Knows what the machine was told (`shadow`), and the life of the worker that is there."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.shadow = Shadow()
        self.tally = Tally(worlds=1)
        self._life = LifeWatch()
        self._cause = ""
        self._rebooted_s = 0.0

    def _see(self, action: ac.Action, event: ev.Event, machine: Machine, actions: list[ac.Action]) -> None:
        kind = type(action)
        if kind is ac.Notice:
            check(action.text and action.kind, "every notice has words", lambda: f"{action}")  # type: ignore[attr-defined]
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

    def _ordered(self, action: ac.Action, event: ev.Event, machine: Machine, actions: list[ac.Action]) -> None:
        """Something for the worker."""
        life = self._life
        assert isinstance(action, _ORDERS)
        check(
            action.generation == machine.history.generation == life.generation and not life.closed,
            "orders go to the living worker",
            lambda: f"{action}, generation {life.generation}, closed {life.closed}",
        )
        if isinstance(action, _ENDS):
            life.ordered = True
            said = any(type(each) is ac.Notice for each in actions)
            check(said, "every kill has a recorded cause", lambda: f"{action} on {event}: nothing was said")
        if isinstance(action, ac.Kill | ac.RequestStop):
            check(in_words(action.reason), "every kill has a recorded cause", lambda: f"{action}")
        if isinstance(action, ac.RequestAutopsy):
            life.autopsies += 1
            check(life.autopsies == 1, "one autopsy a life", lambda: f"{action}")
        if isinstance(action, ac.RequestResize):
            self._check_size(action.batch_size, machine, growing=True)

    def _ordered_spawn(self, action: ac.Spawn, event: ev.Event, machine: Machine, actions: list[ac.Action]) -> None:
        saved = any(isinstance(each, ac.SaveHistory) and each.wait for each in actions)
        check(saved, "the history is durable before a start", lambda: f"{action}")
        check(self.shadow.wish == "run", "what somebody stops stays stopped", lambda: f"{action}: {self.shadow}")
        check(self._life.closed, "one worker at most", lambda: f"{action}, but {self._life} was not closed")
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
        self._life = LifeWatch(
            action.generation, machine.history.trips, closed=False, durable_before=self.shadow.durable
        )

    def _check_size(self, size: int, machine: Machine, growing: bool) -> None:
        policy, batch = self.world.policy.batch, machine.batch
        asked = policy.size or batch.requested
        check(asked is None or size <= asked, "the batch never exceeds what was asked", lambda: f"{size} of {asked}")
        least = min(policy.minimum, asked or size)
        check(size >= least, "the batch is never below the minimum", lambda: f"{size}, at least {least}")
        if growing:
            tripped = self.shadow.tripped
            check(
                all(size < each for each in tripped),
                "never grows onto a size that tripped",
                lambda: f"{size}, {tripped}",
            )
        if asked is not None and policy.size is not None:
            wanted = asked * policy.accumulation
            effective = wanted if policy.preserve_effective else max(1, wanted * size // asked)
            check(
                batch.effective == effective, "the effective batch is kept", lambda: f"{batch.effective}, {effective}"
            )

    def _closed(self, action: ac.CloseGeneration, event: ev.Event, machine: Machine) -> None:
        life, cause = self._life, action.record.get("cause")
        check(cause in _CAUSE_VALUES, "every death has a cause", lambda: f"{action}")
        assert isinstance(cause, str)
        self._cause = cause
        self.tally.causes[cause] += 1
        if isinstance(event, ev.Recovered):
            self.tally.deaths["unseen", cause] += 1
            return
        check(action.generation == life.generation and not life.closed, "a life ends once", lambda: f"{action}, {life}")
        life.closed = not action.alive
        tripped = machine.history.trips - life.trips_before
        check(tripped <= 1, "no double trip for one life", lambda: f"{tripped} trips in generation {life.generation}")
        check(
            tripped == 0 or cause in (*MEMORY_VALUES, Cause.COMPLETED),
            "a trip is a memory cause",
            lambda: f"tripped, and closed with {cause}",
        )
        if isinstance(event, ev.Exited):
            self._check_cause(cause, event)

    def _check_cause(self, cause: str, event: ev.Exited) -> None:
        dead = self.world.last_dead
        assert dead is not None
        assert dead.death is not None
        self.tally.deaths[dead.death.kind, cause] += 1
        if not self._life.ordered:
            share = self._life.footprint_bytes / self.world.policy.memory.limit_bytes
            right = {each.value for each in right_causes(dead.death, share)}
            check(
                cause in right,
                "the cause is the true one",
                lambda: f"{dead.death} was called {cause!r}; right: {right}",
            )

    def _finished(self, action: ac.Finish, event: ev.Event, machine: Machine) -> None:
        self.tally.outcomes[action.outcome] += 1
        check(in_words(action.reason), "every end has a reason in words", lambda: f"{action}")
        check(machine.reason == action.reason, "every end has a reason in words", lambda: f"{action}, {machine.reason}")
        if action.outcome == "completed":
            disk, target = self.world.host.disk, self.world.target_steps
            check(
                disk.acknowledged >= target,
                "completed means that the last step is durable",
                lambda: f"{disk}, {target}",
            )
        elif action.outcome == "stopped":
            check(self.shadow.wish != "run", "a wanted run is never left standing", lambda: f"{action}, {self.shadow}")
        else:
            check(machine.state is State.FATAL, "a failed run is in FATAL", lambda: f"{action} in {machine.state}")
            saved = self.shadow.durable > self._life.durable_before and self._cause != Cause.BLIND.value
            barren = "without a new checkpoint" in action.reason and not isinstance(event, ev.Recovered)
            check(
                not (saved and barren), "never gives up while restarts make progress", lambda: f"{action}, {self._life}"
            )
            dead = self.world.workers[0] if self.world.workers else self.world.last_dead
            if self._cause == Cause.REFUSED.value and dead is not None:
                check(dead.refused, "failed for good only for a reason", lambda: f"{action}, but {dead.death}")


def in_words(text: str) -> bool:
    """Whether people can read it: something, and no value that is missing."""
    return bool(text.strip()) and "None" not in text
