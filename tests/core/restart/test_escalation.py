"""A rung eases the need for memory only the first time."""

from tests.core.policies import batch_policy, memory_policy, run_policy

from mlx_supervisor.core.diagnosis.causes import Cause
from mlx_supervisor.core.history import RunHistory
from mlx_supervisor.core.policy import MIB
from mlx_supervisor.core.restart.batch import BatchPlan
from mlx_supervisor.core.restart.escalation import climb

POLICY = run_policy(memory_policy(limit_bytes=100 * MIB), batch_policy(size=8, grow_after_steps=1))


def test_a_batch_that_grows_back_and_is_halved_again_eases_nothing() -> None:
    """Otherwise a leaking run on a full disk would restart forever."""
    batch, history = BatchPlan(POLICY.batch), RunHistory()
    eased = []
    for _ in range(6):
        eased.append(climb(POLICY, batch, history, Cause.LEAK, progress=False).eased)
        batch.good_step()
    assert eased == [True, False, False, False, False, False]


def test_progress_makes_every_rung_new() -> None:
    batch, history = BatchPlan(POLICY.batch), RunHistory()
    assert climb(POLICY, batch, history, Cause.LEAK, progress=False).eased
    batch.good_step()
    assert not climb(POLICY, batch, history, Cause.LEAK, progress=False).eased
    batch.good_step()
    assert climb(POLICY, batch, history, Cause.PRESSURE, progress=True).eased
    assert climb(POLICY, batch, history, Cause.PRESSURE, progress=False).eased, "a smaller one than any before"
