"""From worker to supervisor: frames arrive late, out of order, twice, from older generations, or not."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from mlx_supervisor.core import events as ev

if TYPE_CHECKING:
    from tests.simulation.world.world import World

LATE_S = 8.0


class SimulatedChannel:
    """Each frame draws its own delay, so that late ones are overtaken.

    An "ancient" frame has another generation: an older one, or one that never existed, but never the next one.
    """

    def __init__(self, world: World) -> None:
        self._world = world

    def delay_s(self) -> float | None:
        """Delay of the next frame; None: it is lost."""
        world, faults = self._world, self._world.faults
        if faults.lost and world.chance.random() < faults.lost:
            return None
        if faults.late and world.chance.random() < faults.late:
            return world.chance.uniform(0, LATE_S)
        return 0.01 * world.chance.random()

    def send(self, delay_s: float, event: ev.WorkerEvent) -> None:
        """Deliver the frame after `delay_s`."""
        world, faults = self._world, self._world.faults
        world.clock.later(delay_s, world.deliver, event)
        if faults.twice and world.chance.random() < faults.twice:
            world.clock.later(delay_s + world.chance.uniform(0, 3), world.deliver, event)
        if faults.ancient and world.chance.random() < faults.ancient:
            older = replace(event, generation=event.generation - world.chance.choice((1, 1, 2, -1_000)))
            world.clock.later(delay_s, world.deliver, older)
