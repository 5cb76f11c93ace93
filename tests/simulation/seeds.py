"""Plays a seed: one run after another in random worlds, until there were enough events."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from tests.simulation.checks.invariant import InvariantError
from tests.simulation.checks.tally import Tally
from tests.simulation.checks.timeline import EventTimeline
from tests.simulation.world.machine import SimulatedRun
from tests.simulation.world.world import World

EVENTS_AT_LEAST = 1_000
TROUBLED_EVENTS = (150, 400, 1_000)
"""Events of a world before its faults end."""


@dataclass
class Failure:
    """The first violation of a seed. `event`: the number of the event within its world."""

    seed: int
    rule: str
    text: str
    world: int
    event: int
    faults: str


def seeds_of(text: str) -> range:
    """ "10000" or "7..99". Raises ValueError."""
    first, dots, last = text.partition("..")
    seeds = range(int(first), int(last) + 1) if dots else range(int(first))
    if not seeds:
        raise ValueError(text)
    return seeds


def play_seed(
    seed: int,
    machine_type: type[SimulatedRun] = SimulatedRun,
    timeline: Callable[[World], EventTimeline | None] = lambda _: None,
) -> tuple[Tally, Failure | None]:
    """All of a seed's worlds; ends at the first violation."""
    chance, tally = Random(seed), Tally(seeds=1)
    while tally.events < EVENTS_AT_LEAST:
        world = World(chance, machine_type=machine_type)
        world.watch.timeline = timeline(world)
        try:
            world.play(chance.choice(TROUBLED_EVENTS))
        except InvariantError as wrong:
            return tally, _failure(seed, world, tally, wrong.rule, str(wrong))
        except Exception as error:
            return tally, _failure(seed, world, tally, "the simulation itself", f"{type(error).__name__}: {error}")
        tally.add(world.watch.tally)
    tally.fewest_events = tally.events
    return tally, None


def _failure(seed: int, world: World, tally: Tally, rule: str, text: str) -> Failure:
    return Failure(seed, rule, text, tally.worlds + 1, world.watch.events, f"{world.faults}")
