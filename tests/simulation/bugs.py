"""Bugs planted on purpose: a simulator that does not find them would prove nothing.

Each is the real machine with one change at its interface (events in, actions out), so that it survives refactoring.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from tests.simulation.seeds import Failure, play_seed
from tests.simulation.world.machine import SimulatedRun

from mlx_supervisor.core import actions as ac
from mlx_supervisor.core import events as ev
from mlx_supervisor.core.diagnosis.causes import Cause
from mlx_supervisor.core.history import RunHistory
from mlx_supervisor.core.machine.states import State
from mlx_supervisor.core.policy import RunPolicy

SEEDS_AT_MOST = 1_000


class KeepsGeneration(SimulatedRun):
    """Does not increase the generation after a recovery."""

    def apply(self, event: ev.Event) -> list[ac.Action]:
        actions = super().apply(event)
        if isinstance(event, ev.Recovered) and actions:
            self.history.generation -= 1
        return actions


class HalvesOnCrash(SimulatedRun):
    """Treats a crash of the user's code as a memory death."""

    def apply(self, event: ev.Event) -> list[ac.Action]:
        if isinstance(event, ev.Exited) and event.exit_code == 1 and event.generation == self.history.generation:
            self.batch.halve(True)
        return super().apply(event)


class StartsTooSoon(SimulatedRun):
    """Does not wait for the old process group to end after SIGKILL."""

    def apply(self, event: ev.Event) -> list[ac.Action]:
        deadline_s = self.next_deadline()
        if isinstance(event, ev.Tick) and self.state is State.KILLING and deadline_s and event.at_s >= deadline_s:
            event = ev.Exited(event.at_s, self.history.generation, None, 9)
        return super().apply(event)


class CountsTwice(SimulatedRun):
    """Counts a trip again when the tripped worker is killed."""

    def apply(self, event: ev.Event) -> list[ac.Action]:
        trips = self.history.trips
        actions = super().apply(event)
        tripped = self.ending is not None and self.ending.cause is Cause.PRESSURE
        if tripped and self.history.trips == trips and any(isinstance(each, ac.Kill) for each in actions):
            self.history.trips += 1
        return actions


class ForgetsDeadline(SimulatedRun):
    """Waits forever for a draining worker."""

    def next_deadline(self) -> float | None:
        return None if self.state is State.DRAINING else super().next_deadline()


class MissingIsZero(SimulatedRun):
    """Treats a missing sample as zero."""

    def apply(self, event: ev.Event) -> list[ac.Action]:
        if isinstance(event, ev.SampleMissing):
            event = ev.Sample(event.at_s, event.generation, 0, 0, 0)
        return super().apply(event)


class LosesStep(SimulatedRun):
    """Loses the durable step when it restores the history."""

    def __init__(self, policy: RunPolicy, history: RunHistory | None = None, seed: int = 0) -> None:
        super().__init__(policy, history, seed)
        self.history.durable_step = 0


class RetriesRefused(SimulatedRun):
    """Restarts a worker that refused its job."""

    def apply(self, event: ev.Event) -> list[ac.Action]:
        if isinstance(event, ev.Exited) and event.exit_code == 78:
            event = replace(event, exit_code=1)
        return super().apply(event)


class DropsKill(SimulatedRun):
    """Does not kill after a hard trip."""

    def apply(self, event: ev.Event) -> list[ac.Action]:
        before = self.state, self.deadline_s
        actions = super().apply(event)
        if isinstance(event, ev.Sample) and self.state is State.KILLING:
            self.state, self.deadline_s = before
            return [each for each in actions if not isinstance(each, ac.Kill)]
        return actions


class NamesNoCause(SimulatedRun):
    """Does not record the end of a killed generation."""

    def apply(self, event: ev.Event) -> list[ac.Action]:
        killed = isinstance(event, ev.Exited) and event.signal == 9
        return [each for each in super().apply(event) if not (killed and isinstance(each, ac.CloseGeneration))]


class NeverGivesUp(SimulatedRun):
    """Resets the restart budget at every death."""

    def apply(self, event: ev.Event) -> list[ac.Action]:
        if isinstance(event, ev.Exited):
            self.budget.reset()
        return super().apply(event)


class BelievesExit0(SimulatedRun):
    """Treats exit status 0 as completion."""

    def apply(self, event: ev.Event) -> list[ac.Action]:
        if isinstance(event, ev.Exited) and event.exit_code == 0:
            self.bye = ev.Bye(event.at_s, event.generation, ev.Outcome.COMPLETED, "", 2**31, None, None)
        return super().apply(event)


class AcceptsOldFrames(SimulatedRun):
    """Accepts frames of older generations."""

    def apply(self, event: ev.Event) -> list[ac.Action]:
        if isinstance(event, ev.WorkerEvent) and not isinstance(event, ev.Recovered):
            event = replace(event, generation=self.history.generation)
        return super().apply(event)


class GrowsBack(SimulatedRun):
    """Forgets the sizes that tripped."""

    def apply(self, event: ev.Event) -> list[ac.Action]:
        self.batch.tripped = frozenset()
        return super().apply(event)


class StartsWhatIsStopped(SimulatedRun):
    """Restarts a run that was stopped."""

    def apply(self, event: ev.Event) -> list[ac.Action]:
        if isinstance(event, ev.Exited) and self.ending is not None:
            self.ending = replace(self.ending, restart=True)
        return super().apply(event)


BUGS: dict[str, type[SimulatedRun]] = {
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
        AcceptsOldFrames,
        GrowsBack,
        StartsWhatIsStopped,
    )
}


def seed_that_finds(name: str, seeds: Iterable[int]) -> Failure | None:
    """The first violation with this bug that the real machine does not have."""
    for seed in seeds:
        _, failure = play_seed(seed, BUGS[name])
        if failure is not None and play_seed(seed)[1] is None:
            return failure
    return None
