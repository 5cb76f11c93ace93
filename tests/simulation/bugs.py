"""Bugs planted into the machine on purpose: a simulator that does not find them would prove nothing.

Each is the real machine but for one thing, done where its interface is widest (events in, actions out) so that it
goes on fitting the machine as that changes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from tests.simulation.seeds import Failure, play_seed
from tests.simulation.world.machine import Machine

from mlx_supervisor.core import actions as ac
from mlx_supervisor.core import events as ev
from mlx_supervisor.core.diagnosis.causes import Cause
from mlx_supervisor.core.history import RunHistory
from mlx_supervisor.core.machine.states import State
from mlx_supervisor.core.policy import RunPolicy

SEEDS_AT_MOST = 1_000


class KeepsGeneration(Machine):
    """Forgets to raise the generation's number after it has taken over."""

    def apply(self, event: ev.Event) -> list[ac.Action]:
        actions = super().apply(event)
        if isinstance(event, ev.Recovered) and actions:
            self.history.generation -= 1
        return actions


class HalvesOnCrash(Machine):
    """Takes a crash of the user's code for want of memory."""

    def apply(self, event: ev.Event) -> list[ac.Action]:
        if isinstance(event, ev.Exited) and event.exit_code == 1 and event.generation == self.history.generation:
            self.batch.halve(True)
        return super().apply(event)


class StartsTooSoon(Machine):
    """After the first SIGKILL it does not wait for the old group's end."""

    def apply(self, event: ev.Event) -> list[ac.Action]:
        deadline_s = self.next_deadline()
        if isinstance(event, ev.Tick) and self.state is State.KILLING and deadline_s and event.at_s >= deadline_s:
            event = ev.Exited(event.at_s, self.history.generation, None, 9)
        return super().apply(event)


class CountsTwice(Machine):
    """Counts a trip again when the worker it has tripped is killed."""

    def apply(self, event: ev.Event) -> list[ac.Action]:
        trips = self.history.trips
        actions = super().apply(event)
        tripped = self.ending is not None and self.ending.cause is Cause.PRESSURE
        if tripped and self.history.trips == trips and any(isinstance(each, ac.Kill) for each in actions):
            self.history.trips += 1
        return actions


class ForgetsDeadline(Machine):
    """Waits for a draining worker for ever."""

    def next_deadline(self) -> float | None:
        return None if self.state is State.DRAINING else super().next_deadline()


class MissingIsZero(Machine):
    """Reads a sample that could not be had as zero."""

    def apply(self, event: ev.Event) -> list[ac.Action]:
        if isinstance(event, ev.SampleMissing):
            event = ev.Sample(event.at_s, event.generation, 0, 0, 0)
        return super().apply(event)


class LosesStep(Machine):
    """Forgets on restoring what is durable."""

    def __init__(self, policy: RunPolicy, history: RunHistory | None = None, seed: int = 0) -> None:
        super().__init__(policy, history, seed)
        self.history.durable_step = 0


class RetriesRefused(Machine):
    """Starts a worker again that has refused its job."""

    def apply(self, event: ev.Event) -> list[ac.Action]:
        if isinstance(event, ev.Exited) and event.exit_code == 78:
            event = replace(event, exit_code=1)
        return super().apply(event)


class DropsKill(Machine):
    """Decides on a hard trip, and does not kill."""

    def apply(self, event: ev.Event) -> list[ac.Action]:
        before = self.state, self.deadline_s
        actions = super().apply(event)
        if isinstance(event, ev.Sample) and self.state is State.KILLING:
            self.state, self.deadline_s = before
            return [each for each in actions if not isinstance(each, ac.Kill)]
        return actions


class NamesNoCause(Machine):
    """Ends a life without recording why, when it was killed."""

    def apply(self, event: ev.Event) -> list[ac.Action]:
        killed = isinstance(event, ev.Exited) and event.signal == 9
        return [each for each in super().apply(event) if not (killed and isinstance(each, ac.CloseGeneration))]


class NeverGivesUp(Machine):
    """Forgets with every death how many lives were for nothing."""

    def apply(self, event: ev.Event) -> list[ac.Action]:
        if isinstance(event, ev.Exited):
            self.budget.reset()
        return super().apply(event)


class BelievesExit0(Machine):
    """Takes exit status 0 for a run that is done."""

    def apply(self, event: ev.Event) -> list[ac.Action]:
        if isinstance(event, ev.Exited) and event.exit_code == 0:
            self.bye = ev.Bye(event.at_s, event.generation, ev.Outcome.COMPLETED, "", 2**31, None, None)
        return super().apply(event)


class HearsTheDead(Machine):
    """Takes frames of older lives for the present one's."""

    def apply(self, event: ev.Event) -> list[ac.Action]:
        if isinstance(event, ev.WorkerEvent) and not isinstance(event, ev.Recovered):
            event = replace(event, generation=self.history.generation)
        return super().apply(event)


class GrowsBack(Machine):
    """Forgets which sizes have tripped."""

    def apply(self, event: ev.Event) -> list[ac.Action]:
        self.batch.tripped = frozenset()
        return super().apply(event)


class StartsWhatIsStopped(Machine):
    """Restarts a worker that somebody has stopped for good."""

    def apply(self, event: ev.Event) -> list[ac.Action]:
        if isinstance(event, ev.Exited) and self.ending is not None:
            self.ending = replace(self.ending, restart=True)
        return super().apply(event)


BUGS: dict[str, type[Machine]] = {
    each.__name__: each
    for each in (
        KeepsGeneration,
        HalvesOnCrash,
        StartsTooSoon,
        CountsTwice,
        ForgetsDeadline,
        MissingIsZero,
        LosesStep,
        RetriesRefused,
        DropsKill,
        NamesNoCause,
        NeverGivesUp,
        BelievesExit0,
        HearsTheDead,
        GrowsBack,
        StartsWhatIsStopped,
    )
}


def seed_that_finds(name: str, seeds: Iterable[int]) -> Failure | None:
    """The first violation that the machine with this bug commits and the real one does not."""
    for seed in seeds:
        _, failure = play_seed(seed, BUGS[name])
        if failure is not None and play_seed(seed)[1] is None:
            return failure
    return None
