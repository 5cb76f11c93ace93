"""What a run's history keeps: counters, and everything that survives the supervisor."""

import json
from dataclasses import asdict

import pytest
from tests.core.machine.golden_ends import COMPLETED, RUNNING
from tests.core.machine.golden_ladder import LEAK_HALVES_ONCE, LIMIT_BELOW_NEED
from tests.core.machine.golden_memory import OVER_LIMIT
from tests.core.machine.timeline import MachineTimeline, policy

from mlx_supervisor.core import actions as ac
from mlx_supervisor.core import events as ev
from mlx_supervisor.core.history import DEFAULT_MTBF_S, RunHistory
from mlx_supervisor.core.machine.machine import apply
from mlx_supervisor.core.machine.run_state import Run
from mlx_supervisor.core.policy import MIB


def test_trips_are_counted_once_each() -> None:
    line = MachineTimeline()
    line.play("""
        start                       -> starting: save, spawn 1 batch 8 of 8
        ready                       -> running
        steps 40 grow=50            -> draining: ask stop
        sample 2300 2               -> killing: kill
        exit signal=9 oom=yes       -> starting: close memory leak, save, spawn 2 batch 4 of 8 save 14
        ready                       -> running
        sample 500                  -> running
        exit signal=9 oom=yes     -> starting: close killed by the kernel for memory, save, spawn 3 batch 2 of 8 save 14
    """)
    assert line.machine.history.trips == 2


def test_replayed_steps_are_counted() -> None:
    line = MachineTimeline()
    line.play(
        RUNNING
        + """
        saved 2                     -> running: save
        exit 1                      -> starting: close crash, save, spawn 2 batch 8 of 8
        ready step=2                -> running
        steps 2                     -> running
    """
    )
    past = line.machine.history
    assert (past.highest_step, past.replayed_steps, past.durable_step) == (4, 1, 2)
    assert past.goodput is not None
    assert 0 < past.goodput < 1


def test_each_spawn_has_the_mean_time_between_failures() -> None:
    """Deaths that cost updates count; requested stops, and trips that saved a checkpoint, do not."""
    line = MachineTimeline(policy(backoff_s=0.0, max_without_progress=9))
    line.play(
        RUNNING
        + """
        restart                     -> draining: ask stop
        exit 75                     -> starting: close requested, save, spawn 2 batch 8 of 8 save 1
        ready                       -> running
        steps 40 grow=50            -> draining: ask stop
        bye stopped                 -> draining
        exit 75                     -> starting: close memory leak, save, spawn 3 batch 4 of 8 save 1
        exit 1                      -> starting: close crash, save, spawn 4 batch 4 of 8 save 1  # before it trained
        ready                       -> running
        steps 1 mib=500             -> running
        exit signal=9 after=100     -> starting: close killed externally, save, spawn 5 batch 4 of 8 save 1
        ready                       -> running
        steps 1                     -> running
        exit 1 after=50             -> starting: close crash, save, spawn 6 batch 4 of 8 save 1
        """
    )
    means_s = [action.mean_time_between_failures_s for action in line.actions if isinstance(action, ac.Spawn)]
    assert means_s[:4] == [DEFAULT_MTBF_S] * 4
    assert means_s[4] == pytest.approx(line.machine.history.active_s - 50.5)
    assert means_s[5] == pytest.approx(line.machine.history.active_s / 2)


@pytest.mark.parametrize("event", [
    ev.Exited(2000.0, 1, 1, None), ev.Sample(2000.0, 1, 2**50, 1, 1), ev.Ready(2000.0, 1, 5, 9, 1, 1),
    ev.Bye(2000.0, 1, ev.Outcome.COMPLETED, "", 5, 1.0, None), ev.CheckpointReport(2000.0, 1, 500, True, 1, 1, 1),
    ev.Exited(2000.0, 3, 1, None),
])  # fmt: skip
def test_events_of_another_generation_are_ignored(event: ev.Event) -> None:
    line = MachineTimeline()
    line.play(
        RUNNING
        + """
        exit 1                      -> backoff: close crash, save
        tick                        -> starting: save, spawn 2 batch 8 of 8 save 1
        ready                       -> running
    """
    )
    before = asdict(line.machine.history)
    assert line.feed(event) == line.feed(event) == []
    assert asdict(line.machine.history) == before


def test_time_that_runs_backwards_counts_once() -> None:
    line = MachineTimeline().play(RUNNING)
    for at_s in (1100.0, 1050.0, 1100.0, 1050.0, 1100.0):
        line.feed(ev.Sample(at_s, 1, MIB, 1, 1))
    assert line.machine.history.active_s == pytest.approx(99.9, abs=0.2)


def _restored(line: MachineTimeline, **changes: object) -> MachineTimeline:
    """A new supervisor with the history of the last `SaveHistory`, through JSON."""
    snapshot = next(action.snapshot for action in reversed(line.actions) if isinstance(action, ac.SaveHistory))
    return MachineTimeline(policy(**changes), RunHistory.restore(json.loads(json.dumps(snapshot))))


def test_a_new_supervisor_resumes_with_the_old_one_s_history() -> None:
    line = MachineTimeline().play(OVER_LIMIT)
    after = _restored(line)
    after.play("""
        recovered step=7            -> stopped: close the supervisor died, save
        start                       -> starting: save, spawn 3 batch 4 of 8
        ready step=5                -> running
        steps 60                    -> running   # 8 tripped for pressure
    """)
    past = after.machine.history
    assert (past.trips, past.tripped_sizes, past.durable_step, past.target_steps) == (1, [8], 5, 1000)
    assert "breaker" in [action.kind for action in after.actions if isinstance(action, ac.Notice)]  # was half-open


def test_a_checkpoint_after_the_last_start_is_kept() -> None:
    line = MachineTimeline().play(RUNNING + "saved -> running: save")
    assert _restored(line).machine.history.durable_step == 3


def test_steps_counted_by_the_dead_supervisor_are_not_replays() -> None:
    line = MachineTimeline().play(RUNNING + "saved -> running: save")
    after = _restored(line)
    after.feed(ev.Recovered(after.at_s, 1, False, 1, 3, 8, 1, train_s=0.9, uptime_s=1.0))
    after.play("start -> starting: save, spawn 2 batch 8 of 8")
    past = after.machine.history
    assert (past.highest_step, past.replayed_steps) == (3, 0)
    assert past.active_s == pytest.approx(line.machine.history.active_s, abs=0.5)


def test_generations_without_progress_are_counted_across_supervisors() -> None:
    line = MachineTimeline().play("""
        start                       -> starting: save, spawn 1 batch 8 of 8
        exit 1                      -> backoff: close crash, save
        tick                        -> starting: save, spawn 2 batch 8 of 8
    """)
    after = _restored(line)
    after.play("""
        recovered                   -> stopped: close the supervisor died, save
        start                       -> starting: save, spawn 3 batch 8 of 8
        exit 1                      -> backoff: close crash, save
        tick                        -> starting: save, spawn 4 batch 8 of 8
        exit 1                      -> fatal: close crash, save, finish failed
    """)


def test_a_worker_s_own_batch_is_kept() -> None:
    line = MachineTimeline(policy(size=None)).play("""
        start                       -> starting: save, spawn 1 batch None
        ready batch=6 effective=12  -> running
        steps 1                     -> running
        saved                       -> running: save
    """)
    _restored(line, size=None).play("start -> starting: save, spawn 2 batch 6 of 12")


def test_a_higher_limit_allows_tripped_sizes_again() -> None:
    line = MachineTimeline().play(OVER_LIMIT)
    _restored(line, limit_bytes=4400 * MIB).play("""
        start                       -> starting: save, spawn 3 batch 4 of 8
        ready                       -> running
        steps 29                    -> running: save, resize 8 of 8
    """)


def test_a_suspended_run_is_resumed_a_stopped_one_is_not() -> None:
    for verb, unfinished, saves in (("suspend", True, ""), ("stop", False, "save, ")):
        line = MachineTimeline().play(
            RUNNING
            + f"""
            {verb}                      -> draining: {saves}ask stop
            exit 75                     -> stopped: close requested, save, finish stopped
        """
        )
        assert line.machine.history.unfinished is unfinished
        assert _restored(line).machine.history.unfinished is unfinished


def test_a_generation_older_than_the_history_is_recovered() -> None:
    """Its end was not recorded, but later ones were."""
    line = MachineTimeline(history=RunHistory(generation=5))
    done = line.feed(ev.Recovered(line.at_s, 3, False, 7))
    assert [action.generation for action in done if isinstance(action, ac.CloseGeneration)] == [3]
    line.play("start -> starting: save, spawn 6 batch 8 of 8")


def test_gradient_checkpointing_stays_on_until_the_limit_is_raised() -> None:
    line = MachineTimeline(policy(size=1)).play(LIMIT_BELOW_NEED)
    _restored(line, size=1).play("start -> starting: save, spawn 3 batch 1 of 1 recompute")
    _restored(line, size=1, limit_bytes=4400 * MIB).play("start -> starting: save, spawn 3 batch 1 of 1")


def test_a_leak_s_halving_is_kept_across_supervisors() -> None:
    after = _restored(MachineTimeline().play(LEAK_HALVES_ONCE))
    after.step = 500
    after.play("""
        recovered                   -> stopped: close the supervisor died, save
        start                       -> starting: save, spawn 5 batch 4 of 8
        ready                       -> running
        steps 40 grow=50            -> draining: ask stop
        saved                       -> draining: save
        exit 75                     -> starting: close memory leak, save, spawn 6 batch 4 of 8
    """)


def test_the_cooldown_survives_another_supervisor_crash() -> None:
    line = MachineTimeline().play("""
        recovered host              -> stopped: close the machine restarted, save
        start                       -> backoff: save
    """)
    after = _restored(line)
    assert after.machine.history.unfinished
    after.play("""
        start                       -> backoff: save
        early after=59              -> backoff
        tick                        -> starting: save, spawn 1 batch 8 of 8
    """)
    _restored(after).play("start -> starting: save, spawn 2 batch 8 of 8")


def test_restarts_of_the_machine_are_counted_across_supervisors() -> None:
    line = MachineTimeline(policy(max_reboots=2)).play("recovered host -> stopped: close the machine restarted, save")
    _restored(line, max_reboots=2).play("recovered host -> fatal: close the machine restarted, save, finish failed")


REFUSED_LATER = """
        start                       -> starting: save, spawn 2 batch 8 of 8
        bye refused seed changed    -> starting
        exit 78                     -> fatal: close refused its job, save, finish failed
            | Not resumed at step 3: seed changed.
"""


@pytest.mark.parametrize("outcome", ["stopped", "completed"])
def test_a_refused_start_leaves_the_run_as_it_was(outcome: str) -> None:
    line = MachineTimeline(policy()).play("""
        start                       -> starting: save, spawn 1 batch 8 of 8
        ready target=3              -> running
        steps 3                     -> running
    """)
    if outcome == "stopped":
        line.play("""
        stop                        -> draining: save, ask stop
        exit 75                     -> stopped: close requested, save, finish stopped
    """)
    else:
        line.play("""
        bye completed               -> running
        exit 0                      -> completed: close completed, save, finish completed
    """)
    line.machine.history.weights_sha256 = "ab"
    before = line.machine.history.snapshot()
    saved = [each for each in line.play(REFUSED_LATER).actions if isinstance(each, ac.SaveHistory)][-1].snapshot
    names = ("outcome", "reason", "error", "highest_step", "target_steps", "restarts", "weights_sha256")
    assert {name: saved.get(name) for name in names} == {name: before.get(name) for name in names}
    assert (saved["outcome"], saved["refused"], saved["unfinished"]) == (outcome, "seed changed", False)


def test_a_refusal_after_a_failed_load_keeps_outcome_and_goodput_too() -> None:
    line = MachineTimeline(policy()).play(COMPLETED)
    past = line.machine.history
    goodput, active_s = past.goodput, past.active_s
    line.play("""
        start                       -> starting: save, spawn 2 batch 8 of 8
        exit 1 after=100            -> backoff: close crash, save
        tick                        -> starting: save, spawn 3 batch 8 of 8
        bye refused seed changed    -> starting
        exit 78 after=100           -> fatal: close refused its job, save, finish failed
    """)
    assert (past.outcome, past.goodput, past.active_s) == ("completed", goodput, active_s)
    line.play("""
        start                       -> starting: save, spawn 4 batch 8 of 8
        ready step=3 target=3       -> running
        bye completed               -> running
        exit 0                      -> completed: close completed, save, finish completed
    """)
    assert past.reason == "already complete; nothing was trained"


def test_the_batch_of_a_generation_is_known_once_it_is_ready() -> None:
    line = MachineTimeline(policy()).play("""
        start                       -> starting: save, spawn 1 batch 8 of 8
        ready                       -> running
        stop                        -> draining: save, ask stop
        exit 75                     -> stopped: close requested, save, finish stopped
    """)
    (closed,) = [each for each in line.actions if isinstance(each, ac.CloseGeneration)]
    assert (closed.record["batch_size"], closed.record["accumulation"]) == (8, 1)


def test_updates_that_no_report_arrived_of_count() -> None:
    run = Run(policy(), RunHistory(generation=4, highest_step=20, durable_step=10, target_steps=40))
    apply(run, ev.Command(0.0, ev.CommandKind.START))
    apply(run, ev.Spawned(1.0, 5, 7))
    ended = apply(run, ev.Exited(9.0, 5, None, 9, durable_step=30, first_step=11, last_step=35))
    past = run.history
    assert (past.durable_step, past.highest_step, past.replayed_steps, past.without_progress) == (30, 35, 10, 0)
    [closed] = [each for each in ended if isinstance(each, ac.CloseGeneration)]
    assert (closed.record["first_step"], closed.record["last_step"]) == (11, 35)


def test_a_checkpoint_that_the_generation_did_not_write_is_no_progress() -> None:
    run = Run(policy(), RunHistory(generation=4, highest_step=20, durable_step=10, target_steps=40))
    apply(run, ev.Command(0.0, ev.CommandKind.START))
    apply(run, ev.Spawned(1.0, 5, 7))
    apply(run, ev.Exited(9.0, 5, None, 9, durable_step=30))
    assert (run.history.highest_step, run.history.replayed_steps) == (20, 0)
