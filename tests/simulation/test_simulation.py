"""Some hundred seeds of simulated worlds; `make simulate` plays many more, `make simulate SEED=42` replays one."""

from random import Random

import pytest
from tests.simulation.checks.tally import Tally
from tests.simulation.checks.timeline import EventTimeline
from tests.simulation.many import play_chunk
from tests.simulation.seeds import EVENTS_AT_LEAST, play_seed, seeds_of
from tests.simulation.world.faults import LIMIT_MIB, Faults, steady_policy
from tests.simulation.world.world import World

CHUNK = 40


def steady(seed: int, faults: Faults, target_steps: int = 400, limit_mib: int = LIMIT_MIB) -> World:
    """One run to its end, with one fault and a supervisor that handles late events before missed deadlines."""
    chance = Random(seed)
    policy = steady_policy(chance, limit_mib)
    return World(chance, faults=faults, policy=policy, target_steps=target_steps, sample_s=0.1, forgives=1.0).play(
        1_000_000
    )


@pytest.mark.parametrize("first", range(0, 120, CHUNK))
def test_seeds(first: int) -> None:
    tally, failures = play_chunk(range(first, first + CHUNK))
    assert not failures, f"replay with `make simulate SEED={failures[0].seed}`: {failures[0]}"
    assert tally.fewest_events >= EVENTS_AT_LEAST
    # a simulation without faults would prove nothing
    assert tally.spawns > 6 * CHUNK
    assert tally.supervisors > CHUNK / 4
    assert tally.outcomes["completed"] == tally.worlds or tally.outcomes["completed"] > tally.worlds
    assert tally.outcomes["failed"] > CHUNK / 4
    assert len(tally.causes) > 12


def test_a_seed_replays_exactly() -> None:
    def lines(seed: int) -> list[str]:
        kept: list[EventTimeline] = []

        def record(_: World) -> EventTimeline:
            kept.append(EventTimeline(every=True))
            return kept[-1]

        play_seed(seed, timeline=record)
        return [line for each in kept for line in each.lines]

    for seed in range(3):
        assert lines(seed) == lines(seed) != lines(seed + 1)


def test_seeds_of() -> None:
    assert seeds_of("3") == range(3)
    assert seeds_of("7..9") == range(7, 10)
    for wrong in ("", "0", "9..7", "x", "1.."):
        with pytest.raises(ValueError):
            seeds_of(wrong)


def test_tallies_add_up() -> None:
    each = [play_chunk(range(seed, seed + 1))[0] for seed in range(3)]
    total = Tally()
    for one in each:
        total.add(one)
    assert total == play_chunk(range(3))[0]
    assert total.seeds == 3
    assert total.fewest_events == min(one.events for one in each)
    assert any("3 seeds" in line for line in total.lines())


@pytest.mark.parametrize("leak_mib", [5, 20, 50, 100])
def test_a_steady_leak_costs_no_step(leak_mib: float) -> None:
    """Each trip comes early enough for a checkpoint: no step is replayed. 100 MiB/step: 30 steps of room."""
    for seed in range(3):
        world = steady(
            seed, Faults(base_mib=100.0, per_sample_mib=20.0, leak_mib=leak_mib, noise_mib=10.0), limit_mib=3300
        )
        past = world.supervisor.machine.history
        assert past.outcome == "completed"
        assert past.replayed_steps == 0
        assert past.trips >= (1 if leak_mib * 400 > 3300 else 0)


def test_a_run_that_always_leaks_completes() -> None:
    """Restarts are unlimited while each makes progress."""
    world = steady(3, Faults(leak_mib=50.0), target_steps=6000)
    assert world.supervisor.machine.history.outcome == "completed"
    assert world.watch.tally.spawns > 100
    assert set(world.watch.tally.outcomes) == {"completed"}


def test_without_faults_there_is_no_restart() -> None:
    world = steady(1, Faults(), target_steps=3000)
    assert world.watch.tally.causes == {"completed": world.watch.tally.spawns}
    assert world.supervisor.machine.history.trips == 0


@pytest.mark.parametrize("faults", [Faults(sleeps_after_s=100.0), Faults(stalls_after_s=60.0)])
def test_sleep_and_stalls_are_no_hangs(faults: Faults) -> None:
    """Events that arrived during sleep are handled before missed deadlines."""
    for seed in range(5):
        assert set(steady(seed, faults).watch.tally.causes) == {"completed"}


def test_deaths_of_the_supervisor_cost_no_durable_step() -> None:
    worlds = [steady(seed, Faults(supervisor_dies=0.003)) for seed in range(5)]
    assert sum(world.watch.tally.supervisors for world in worlds) > 5
    for world in worlds:
        assert set(world.watch.tally.outcomes) == {"completed"}
