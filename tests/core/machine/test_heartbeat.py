"""A hang is a silence much longer than the run's own pace explains."""

from mlx_supervisor.core.events import Phase
from mlx_supervisor.core.machine.heartbeat import FIRST_STEP_S, LEAST_S, OTHER_PHASE_S, SLOWEST_TIMES, Heartbeat


def test_there_is_no_deadline_before_ready() -> None:
    assert Heartbeat(None).deadline_s is None


def test_the_first_step_may_take_long() -> None:
    heartbeat = Heartbeat(None)
    heartbeat.progress(100.0, Phase.TRAIN)
    assert heartbeat.deadline_s == 100 + FIRST_STEP_S


def test_the_slowest_step_sets_the_deadline() -> None:
    heartbeat = Heartbeat(None)
    heartbeat.progress(100.0, Phase.TRAIN, 0.1)
    assert heartbeat.deadline_s == 100 + LEAST_S
    heartbeat.progress(200.0, Phase.TRAIN, 30.0)
    heartbeat.progress(300.0, Phase.TRAIN, 1.0)
    assert heartbeat.deadline_s == 300 + SLOWEST_TIMES * 30


def test_other_phases_have_their_own_allowance() -> None:
    heartbeat = Heartbeat(None)
    heartbeat.progress(100.0, Phase.TRAIN, 0.1)
    for phase in (Phase.EVAL, Phase.CHECKPOINT, Phase.LOAD):
        heartbeat.progress(200.0, phase)
        assert heartbeat.deadline_s == 200 + OTHER_PHASE_S


def test_a_checkpoint_beside_an_evaluation_does_not_end_the_evaluation() -> None:
    heartbeat = Heartbeat(None)
    for phase, allowance_s in ((Phase.EVAL, OTHER_PHASE_S), (Phase.CHECKPOINT, LEAST_S), (Phase.TRAIN, LEAST_S)):
        heartbeat.progress(100.0, phase, 0.1)
        heartbeat.checkpointed(200.0)
        assert heartbeat.deadline_s == 200 + allowance_s


def test_the_user_s_timeout_applies_to_every_phase() -> None:
    heartbeat = Heartbeat(30.0)
    for phase in Phase:
        heartbeat.progress(100.0, phase, 500.0)
        assert heartbeat.deadline_s == 130


def test_events_out_of_order_do_not_shorten_the_deadline() -> None:
    heartbeat = Heartbeat(30.0)
    heartbeat.progress(100.0, Phase.TRAIN)
    heartbeat.progress(99.0, Phase.TRAIN)
    assert heartbeat.deadline_s == 130
