"""Many seeds of the simulated world. `SIMULATION_SEED=1234 pytest tests/simulation` replays one."""

import os
from collections import Counter

import pytest
from tests.simulation.world import LIMIT_MIB, Faults, World

SEEDS = 200
REPLAY = os.environ.get("SIMULATION_SEED")


@pytest.mark.parametrize("first", [int(REPLAY)] if REPLAY else range(0, SEEDS, 20))
def test_seeds(first: int) -> None:
    for seed in [first] if REPLAY else range(first, first + 20):
        try:
            World(seed).run()
        except Exception as error:
            raise AssertionError(f"replay with SIMULATION_SEED={seed}: {error!r}") from error


def test_a_seed_replays_exactly() -> None:
    def trace(seed: int) -> tuple[float, int, object]:
        world = World(seed).run()
        return world.now_s, world.spawns, world.machine.history.snapshot()

    assert [trace(seed) for seed in range(5)] == [trace(seed) for seed in range(5)]


def test_the_worlds_are_as_troubled_as_they_should_be() -> None:
    """A simulation in which nothing goes wrong would prove nothing."""
    worlds = [World(seed).run() for seed in range(60)]
    outcomes = Counter(world.finished.outcome for world in worlds if world.finished)
    assert outcomes["completed"] > 40
    assert outcomes["failed"] >= 1
    assert sum(world.spawns for world in worlds) > 200
    assert sum(world.machine.history.trips for world in worlds) > 50


@pytest.mark.parametrize("leak_mib", [5, 20, 50, 100])
def test_a_steady_leak_costs_no_step(leak_mib: float) -> None:
    """Each trip comes early enough for a checkpoint: nothing is ever done twice."""
    world = World(7, faults=Faults(leak_mib=leak_mib, noise_mib=10.0)).run()
    past = world.machine.history
    assert world.finished is not None
    assert world.finished.outcome == "completed"
    assert past.replayed_steps == 0
    assert past.trips >= (1 if leak_mib * 400 > LIMIT_MIB else 0)


def test_a_hundred_days_of_leaking_end() -> None:
    """Restarts without number, as long as each gets somewhere."""
    world = World(3, target_steps=6000, faults=Faults(leak_mib=50.0, base_mib=300.0)).run()
    assert world.finished is not None
    assert world.finished.outcome == "completed"
    assert world.spawns > 150
