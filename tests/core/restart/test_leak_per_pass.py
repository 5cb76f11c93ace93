"""A leak in each forward pass is not met with smaller micro-batches, which only make it faster."""

import pytest
from tests.core.policies import batch_policy, memory_policy, run_policy

from mlx_supervisor.core import events as ev
from mlx_supervisor.core.diagnosis.causes import Cause
from mlx_supervisor.core.history import RunHistory
from mlx_supervisor.core.policy import MIB
from mlx_supervisor.core.restart.batch import BatchPlan
from mlx_supervisor.core.restart.escalation import climb
from mlx_supervisor.core.restart.leak_per_pass import learn
from mlx_supervisor.core.restart.update_growth import UpdateGrowth

LIMIT = 2200 * MIB
POLICY = run_policy(memory_policy(limit_bytes=LIMIT), batch_policy(size=8))


def grown(size: int, mib_per_update: float, updates: int = 5) -> UpdateGrowth:
    growth = UpdateGrowth()
    for step in range(1, updates + 1):
        held = int((800 + mib_per_update * step) * MIB)
        growth.add(ev.StepReport(step, 1, step, 1.0, 1, 8, 1e-3, 1.0, size, 8 // size, 0, 0, process_bytes=held), None)
    return growth


class Deaths:
    def __init__(self) -> None:
        self.batch, self.past = BatchPlan(POLICY.batch), RunHistory()

    def death(self, mib: float, cause: Cause = Cause.PRESSURE, updates: int = 5, progress: bool = True) -> str:
        growth = grown(self.batch.size or 0, mib, updates)
        kept = learn(self.batch, self.past, growth, cause, limit_bytes=LIMIT, progress=progress)
        rung = kept or climb(POLICY, self.batch, self.past, cause, progress=progress)
        self.past = RunHistory.restore(self.past.snapshot())  # carries over a death of the supervisor
        return f"{self.batch.size} {'leak' if kept else cause.value}: {rung.text}"


def test_a_leak_that_halving_does_not_slow_restores_the_micro_batch_and_keeps_it() -> None:
    deaths = Deaths()
    assert deaths.death(80).startswith("4 memory pressure")
    assert deaths.death(160) == (
        "8 leak: micro-batch restored to 8: halving did not slow the leak (80.0 MiB/step before, 160.0 MiB/step after)"
    )
    assert not deaths.batch.tripped
    for _ in range(3):
        assert deaths.death(80).startswith("8 leak: micro-batch kept at 8")
    assert deaths.death(80, updates=1).startswith("8 leak"), "too few updates: the former verdict holds"


@pytest.mark.parametrize("mib", [40, 1])
def test_growth_that_falls_with_the_micro_batch_is_pressure(mib: float) -> None:
    deaths = Deaths()
    deaths.death(80)
    assert deaths.death(mib).startswith("2 memory pressure")
    assert deaths.batch.tripped == {8, 4}


def test_pressure_without_growth_is_never_restored() -> None:
    deaths = Deaths()
    deaths.death(0)
    assert deaths.death(160).startswith("2 memory pressure")
    assert deaths.death(320).startswith("4 leak"), "only to the size that showed the leak"
    assert deaths.batch.tripped == {8}


def test_without_a_new_checkpoint_the_ladder_goes_on() -> None:
    deaths = Deaths()
    deaths.death(80)
    deaths.death(160)
    assert deaths.death(80, progress=False).startswith("4 memory pressure")
    assert deaths.death(160, progress=False).startswith("2 memory pressure")


def test_a_known_leak_of_each_update_keeps_the_room_of_the_smaller_micro_batch() -> None:
    deaths = Deaths()
    deaths.death(80, Cause.LEAK)
    assert deaths.death(80, Cause.LEAK).startswith("4 memory leak")


@pytest.mark.parametrize("cause", [Cause.DEVICE_OOM, Cause.OOM_KILL, Cause.OUT_OF_MEMORY])
def test_a_death_that_the_breaker_did_not_judge_keeps_its_cause(cause: Cause) -> None:
    deaths = Deaths()
    deaths.death(80)
    assert deaths.death(160, cause).startswith(f"2 {cause.value}")
