"""What the machine says and keeps: reasons, counters, and a history that outlives the supervisor."""

import json
from dataclasses import asdict

import pytest
from tests.core.machine.golden_ends import ENDS, RUNNING
from tests.core.machine.golden_ladder import LADDER
from tests.core.machine.golden_memory import MEMORY
from tests.core.machine.golden_waiting import WAITING
from tests.core.machine.timeline import Timeline, policy, show

from mlx_supervisor.core import actions as ac
from mlx_supervisor.core import events as ev
from mlx_supervisor.core.history import UNTROUBLED_S, RunHistory
from mlx_supervisor.core.machine.machine import apply
from mlx_supervisor.core.machine.run_state import Run
from mlx_supervisor.core.machine.states import State
from mlx_supervisor.core.policy import MIB, MemoryPolicy, RunPolicy

GOLDEN = MEMORY | LADDER | WAITING | ENDS
REASONS = {
    "a limit that the model itself breaks": ["2,200 MiB", "2,300 MiB", "before the model was loaded", "memory.limit"],
    "a limit that the first step breaks at every size": ["2,200 MiB", "before the first step at batch 1"],
    "refused: at once": ["no such model"],
    "crashes wait longer each time, and the end comes": ["3 lives", "RuntimeError"],
    "another batch than ordered is our bug: no endless loop": ["4 samples", "8 were ordered"],
    "nobody can stop it": ["survived 3 SIGKILLs"],
    "a program that is not there": ["no such file"],
    "from the start to the end": ["all steps done"],
    "the same error at the same step will come every time": ["ValueError: bad", "step 4", "restart.max_same_error"],
    "a loss that is not finite: once more, then the end": ["not finite 2 times", "step 4", "learning rate"],
    "memory and crashes have budgets of their own": ["3 lives", "memory", "restart.max_memory_without_progress"],
    "a machine that restarts whenever the run runs": ["3 times in a row", "restart.max_reboots"],
    "a limit below the need: gradient checkpointing before the end": ["2,200 MiB", "memory.limit"],
}


@pytest.mark.parametrize("name", REASONS)
def test_the_reason_says_what_a_person_needs(name: str) -> None:
    rules, script = GOLDEN[name]
    line = Timeline(rules)
    line.play(script)
    reason = next(action.reason for action in reversed(line.actions) if isinstance(action, ac.Finish))
    for word in REASONS[name]:
        assert word in reason


def test_the_last_word_of_a_crash_is_kept() -> None:
    line = Timeline(policy(max_without_progress=1)).play(
        RUNNING + "exit 1 ValueError: bad -> fatal: close crash, save, finish failed"
    )
    assert "ValueError: bad" in line.machine.reason


def test_a_person_s_reason_wins_over_the_trip_s() -> None:
    rules, script = MEMORY["a soft trip leaves time for the checkpoint that it was told takes long"]
    line = Timeline(rules)
    line.play(script)
    line.play("""
        stop going home             -> draining
        exit 75                     -> stopped: close memory leak, save, finish stopped
    """)
    assert line.machine.reason == "Stop asked for (going home)"


def test_a_reason_without_end_still_fits_a_frame() -> None:
    line = Timeline().play(RUNNING)
    done = line.feed(ev.Command(line.at_s, ev.CommandKind.STOP, "x" * 100_000))
    reasons = [action.reason for action in done if isinstance(action, ac.RequestStop)]
    assert len(reasons) == 1
    assert len(reasons[0]) <= 512


def test_trips_are_counted_once_each() -> None:
    line = Timeline()
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


def test_steps_done_again_are_counted() -> None:
    line = Timeline()
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


def test_each_life_is_told_how_often_the_run_fails() -> None:
    """Deaths that cost updates count; stops that were asked for, and trips that could save, do not."""
    line = Timeline(policy(backoff_s=0.0, max_without_progress=9))
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
    told = [action.mean_time_between_failures_s for action in line.actions if isinstance(action, ac.Spawn)]
    assert told[:4] == [UNTROUBLED_S] * 4
    assert told[4] == pytest.approx(line.machine.history.active_s - 50.5)
    assert told[5] == pytest.approx(line.machine.history.active_s / 2)


@pytest.mark.parametrize("event", [
    ev.Exited(2000.0, 1, 1, None), ev.Sample(2000.0, 1, 2**50, 1, 1), ev.Ready(2000.0, 1, 5, 9, 1, 1),
    ev.Bye(2000.0, 1, ev.Outcome.COMPLETED, "", 5, 1.0, None), ev.CheckpointReport(2000.0, 1, 500, True, 1, 1, 1),
    ev.Exited(2000.0, 3, 1, None),
])  # fmt: skip
def test_another_generation_s_events_mean_nothing(event: ev.Event) -> None:
    line = Timeline()
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


def test_time_that_runs_backwards_is_not_counted_twice() -> None:
    line = Timeline().play(RUNNING)
    for at_s in (1100.0, 1050.0, 1100.0, 1050.0, 1100.0):
        line.feed(ev.Sample(at_s, 1, MIB, 1, 1))
    assert line.machine.history.active_s == pytest.approx(99.9, abs=0.2)


def _restored(line: Timeline, **changes: object) -> Timeline:
    """A supervisor that starts with what the last `SaveHistory` held, by way of JSON."""
    snapshot = next(action.snapshot for action in reversed(line.actions) if isinstance(action, ac.SaveHistory))
    return Timeline(policy(**changes), RunHistory.restore(json.loads(json.dumps(snapshot))))


def test_a_new_supervisor_goes_on_where_the_old_one_stopped() -> None:
    rules, script = MEMORY["over the limit: killed at once, at two samples"]
    line = Timeline(rules)
    line.play(script)
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


def test_what_was_saved_after_the_last_start_is_known_to_a_new_supervisor() -> None:
    line = Timeline().play(RUNNING + "saved -> running: save")
    assert _restored(line).machine.history.durable_step == 3


def test_steps_that_the_dead_supervisor_counted_are_no_replay() -> None:
    line = Timeline().play(RUNNING + "saved -> running: save")
    after = _restored(line)
    after.feed(ev.Recovered(after.at_s, 1, False, 1, 3, 8, 1, train_s=0.9, lived_s=1.0))
    after.play("start -> starting: save, spawn 2 batch 8 of 8")
    past = after.machine.history
    assert (past.highest_step, past.replayed_steps) == (3, 0)
    assert past.active_s == pytest.approx(line.machine.history.active_s, abs=0.5)


def test_lives_without_progress_are_counted_across_supervisors() -> None:
    line = Timeline().play("""
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


def test_a_worker_s_own_batch_is_remembered() -> None:
    line = Timeline(policy(size=None)).play("""
        start                       -> starting: save, spawn 1 batch None
        ready batch=6 effective=12  -> running
        steps 1                     -> running
        saved                       -> running: save
    """)
    _restored(line, size=None).play("start -> starting: save, spawn 2 batch 6 of 12")


def test_a_higher_limit_gives_tripped_sizes_another_chance() -> None:
    rules, script = MEMORY["over the limit: killed at once, at two samples"]
    line = Timeline(rules)
    line.play(script)
    _restored(line, limit_bytes=4400 * MIB).play("""
        start                       -> starting: save, spawn 3 batch 4 of 8
        ready                       -> running
        steps 29                    -> running: save, resize 8 of 8
    """)


def test_a_suspended_run_is_still_wanted_a_stopped_one_is_not() -> None:
    for verb, wanted in (("suspend", True), ("stop", False)):
        line = Timeline().play(
            RUNNING
            + f"""
            {verb}                      -> draining: ask stop
            exit 75                     -> stopped: close requested, save, finish stopped
        """
        )
        assert line.machine.history.wanted is wanted
        assert _restored(line).machine.history.wanted is wanted


def test_every_action_can_be_shown() -> None:
    shown = {type(action) for rules, script in GOLDEN.values() for action in Timeline(rules).play(script).actions}
    assert {each.__name__ for each in shown} == {each.__name__ for each in ac.Action.__subclasses__()}
    assert show(ac.Kill(1, "")) == "kill"


def test_a_hard_trip_kills_before_it_talks() -> None:
    machine = Run(RunPolicy(MemoryPolicy(limit_bytes=100 * MIB)))
    apply(machine, ev.Command(0.0, ev.CommandKind.START))
    apply(machine, ev.Spawned(0.1, 1, pid=7))
    apply(machine, ev.Ready(0.2, 1, step=0, target_steps=10, batch_size=1, effective_batch=1))
    apply(machine, ev.Sample(0.3, 1, 200 * MIB, 0, 1))
    actions = apply(machine, ev.Sample(0.31, 1, 200 * MIB, 0, 1))
    assert isinstance(actions[0], ac.Kill)
    assert any(isinstance(action, ac.Notice) for action in actions[1:])


RUNGS = [
    ("a leak halves the batch once, then restarts at that size", "restart", 0,
     ["grows by", "from 8 to 4", "batch.minimum"]),
    ("a leak halves the batch once, then restarts at that size", "restart", 1, ["stays at 4", "batch.halve_on_leak"]),
    ("a leak, and no halving wanted", "restart", 0, ["stays at 8", "batch.halve_on_leak"]),
    ("gradient checkpointing is the last resort at the smallest batch", "restart", 1,
     ["Unable to allocate", "gradient checkpointing is turned on", "memory.gradient_checkpointing"]),
    ("gradient checkpointing never", "restart", 0, ["stays at 1", "memory.gradient_checkpointing is 'never'"]),
    ("gradient checkpointing always", "restart", 0, ["on already"]),
    ("Metal's buffers run out: the same batch", "restart", 0, ["499000", "batch stays", "buffers"]),
    ("the GPU watchdog: the same batch", "restart", 0, ["GPU watchdog", "batch stays"]),
    ("clearing the caches makes room and the life goes on", "relief", 0, ["2,180 MiB", "memory.clear_first"]),
    ("memory can't be seen", "blind", 0, ["20 samples", "no such file", "memory.missing_samples"]),
    ("memory that comes back late", "waiting", 0, ["1.7 of 1.8 GiB", "restart.wait_for_memory_s"]),
    ("memory that comes back late", "waited", 0, ["1.8 GiB", "starting"]),
    ("a busy machine is waited for once", "waited", 0, ["1.5 of 1.8 GiB", "100 s", "all the same"]),
    ("a machine in distress is waited for even before the first start", "waiting", 0, ["8.8 GiB", "critical"]),
    ("the machine restarted: not at once", "cooldown", 0, ["60 s", "restart.reboot_cooldown_s"]),
    ("gradient checkpointing is the last resort at the smallest batch", "ready", 2, ["with gradient checkpointing"]),
    ("a leak is looked into once it is sure, and once a life", "autopsy", 0, ["a list", "step 18"]),
    ("a leak is looked into once it is sure, and once a life", "autopsy", 2, ["nothing was found"]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "kind", "number", "words"), RUNGS, ids=[f"{each[0]}-{each[1]}" for each in RUNGS])
def test_one_sentence_says_what_was_measured_what_is_done_and_which_setting_it_is(
    name: str, kind: str, number: int, words: list[str]
) -> None:
    rules, script = GOLDEN[name]
    text = Timeline(rules).play(script).says(kind)[number]
    assert [word for word in words if word not in text] == [], text
    assert "\n" not in text


def _records(line: Timeline) -> list[dict[str, object]]:
    return [dict(action.record) for action in line.actions if isinstance(action, ac.CloseGeneration)]


def test_a_life_s_record_has_its_error_its_autopsy_and_whether_it_computed_again() -> None:
    line = Timeline(policy(autopsy=True, size=1, backoff_s=0.0)).play("""
        start                       -> starting: save, spawn 1 batch 1 of 1
        ready can=yes               -> running
        steps 18 grow=50            -> running: ask autopsy
        autopsied a list, a dict    -> running
        exit 1 RuntimeError: [malloc] Unable to allocate 9 bytes. -> starting: close device out of memory, save, spawn 2 batch 1 of 1 save 9 recompute
        ready can=yes               -> running
        exit 1 KeyError: 7          -> starting: close crash, save, spawn 3 batch 1 of 1 save 9 recompute
        ready can=yes               -> running
        stop                        -> draining: ask stop
        exit 75                     -> stopped: close requested, save, finish stopped
    """)  # noqa: E501
    first, second, third = _records(line)
    assert (first["autopsy"], first["gradient_checkpointing"]) == (["a list", "a dict"], False)
    assert "Unable to allocate" in str(first["error"])
    assert (second["autopsy"], second["gradient_checkpointing"], third["error"]) == ([], True, "")
    assert "KeyError: 7" in str(second["error"])
    assert line.machine.history.autopsy == ["a list", "a dict"]
    assert "KeyError: 7" in line.machine.history.error
    json.dumps(_records(line))


def test_a_task_that_cannot_checkpoint_gradients_is_not_said_to() -> None:
    line = Timeline(policy(gradient_checkpointing="always", max_without_progress=1)).play("""
        start                       -> starting: save, spawn 1 batch 8 of 8 recompute
        ready                       -> running
        exit 1                      -> fatal: close crash, save, finish failed
    """)
    assert [record["gradient_checkpointing"] for record in _records(line)] == [False]
    assert "this task hasn't" in line.says("ready")[0]


def test_a_worker_older_than_the_history_is_taken_over_too() -> None:
    """Its end could not be noted; later ones could."""
    line = Timeline(history=RunHistory(generation=5))
    done = line.feed(ev.Recovered(line.at_s, 3, False, 7))
    assert [action.generation for action in done if isinstance(action, ac.CloseGeneration)] == [3]
    line.play("start -> starting: save, spawn 6 batch 8 of 8")


ASKED_WHAT_GREW = """
    start                       -> starting: save, spawn 1 batch 8 of 8
    ready                       -> running
    steps 18 grow=50            -> running: ask autopsy
"""


def test_only_what_was_asked_for_is_heard_of_what_grew_and_only_once() -> None:
    line = Timeline(policy(autopsy=True)).play(RUNNING)
    line.feed(ev.Autopsied(line.at_s, 1, 3, ("unasked",), 1.0))
    assert line.machine.history.autopsy == line.says("autopsy") == []
    line = Timeline(policy(autopsy=True)).play(ASKED_WHAT_GREW)
    for number in range(1000):
        line.feed(ev.Autopsied(line.at_s, 1, 18, (f"answer {number}",), 1.0))
    assert line.machine.history.autopsy == ["answer 0"]
    assert len(line.says("autopsy")) == 1


def test_a_stop_during_a_trip_does_not_hide_what_was_measured() -> None:
    for verb in ("stop", "kill", "suspend"):
        line = Timeline().play(RUNNING)
        line.feed(ev.Sample(line.at_s, 1, 2300 * MIB, 0, 1))
        line.feed(ev.Sample(line.at_s, 1, 2300 * MIB, 0, 1))
        assert line.machine.state is State.KILLING
        line.feed(ev.Command(line.at_s, ev.CommandKind(verb), "enough"))
        line.feed(ev.Exited(line.at_s, 1, None, 9))
        assert line.machine.state is State.STOPPED
        assert "enough" in line.machine.reason
        assert (_records(line)[0]["cause"], line.machine.batch.size) == ("memory pressure", 4)
        assert _records(line)[0]["error"] == line.machine.history.error == "2,300 MiB is over the limit of 2,200 MiB"


def test_a_start_after_a_stop_during_a_trip_says_why_the_batch_is_halved() -> None:
    line = Timeline().play(RUNNING)
    for event in (
        ev.Sample(line.at_s, 1, 2300 * MIB, 0, 1),
        ev.Sample(line.at_s, 1, 2300 * MIB, 0, 1),
        ev.Command(line.at_s, ev.CommandKind.STOP, "enough"),
        ev.Command(line.at_s, ev.CommandKind.START, "no, go on"),
        ev.Exited(line.at_s, 1, None, 9),
    ):
        line.feed(event)
    assert line.machine.state is State.STARTING
    assert "2,300 MiB is over the limit" in line.says("restart")[0]
    assert "enough" not in line.says("restart")[0]


def test_an_answer_of_the_life_before_is_not_that_of_the_next() -> None:
    line = Timeline(policy(autopsy=True)).play(ASKED_WHAT_GREW)
    line.play("""
        exit 1                      -> backoff: close crash, save
        tick                        -> starting: save, spawn 2 batch 8 of 8 save 9
        ready                       -> running
        autopsied late              -> running
    """)
    assert line.says("autopsy") == []


def test_a_start_that_the_world_refuses_says_why_while_it_waits() -> None:
    line = Timeline().play("start -> starting: save, spawn 1 batch 8 of 8")
    line.feed(ev.ActionFailed(line.at_s, "spawn", "[Errno 28] No space left on device", passing=True))
    assert line.machine.state is State.BACKOFF
    assert "No space left on device; tried again in 1 s" in line.machine.reason
    assert "No space left" in str(_records(line)[-1]["error"])


def test_findings_without_end_are_bounded() -> None:
    line = Timeline(policy(autopsy=True)).play(ASKED_WHAT_GREW)
    line.feed(ev.Autopsied(line.at_s, 1, 3, tuple("x" * 9999 for _ in range(99)), 1.0))
    assert len(line.says("autopsy")) == len(line.machine.history.autopsy) == 24
    assert max(len(each) for each in line.machine.history.autopsy) <= 300


def test_gradient_checkpointing_outlives_the_supervisor_until_the_limit_is_raised() -> None:
    rules, script = LADDER["a limit below the need: gradient checkpointing before the end"]
    line = Timeline(rules).play(script)
    _restored(line, size=1).play("start -> starting: save, spawn 3 batch 1 of 1 recompute")
    _restored(line, size=1, limit_bytes=4400 * MIB).play("start -> starting: save, spawn 3 batch 1 of 1")


def test_a_leak_s_halving_is_remembered_by_the_next_supervisor() -> None:
    rules, script = LADDER["a leak halves the batch once, then restarts at that size"]
    after = _restored(Timeline(rules).play(script))
    after.step = 500
    after.play("""
        recovered                   -> stopped: close the supervisor died, save
        start                       -> starting: save, spawn 5 batch 4 of 8
        ready                       -> running
        steps 40 grow=50            -> draining: ask stop
        saved                       -> draining: save
        exit 75                     -> starting: close memory leak, save, spawn 6 batch 4 of 8
    """)


def test_the_cooldown_survives_another_supervisor_s_death() -> None:
    line = Timeline().play("""
        recovered host              -> stopped: close the machine restarted, save
        start                       -> backoff: save
    """)
    after = _restored(line)
    assert after.machine.history.wanted
    after.play("""
        start                       -> backoff: save
        early after=59              -> backoff
        tick                        -> starting: save, spawn 1 batch 8 of 8
    """)
    _restored(after).play("start -> starting: save, spawn 2 batch 8 of 8")


def test_restarts_of_the_machine_are_counted_across_supervisors() -> None:
    line = Timeline(policy(max_reboots=2)).play("recovered host -> stopped: close the machine restarted, save")
    _restored(line, max_reboots=2).play("recovered host -> fatal: close the machine restarted, save, finish failed")


def test_a_run_that_waits_says_why() -> None:
    line = Timeline().play(RUNNING + "exit 1 ValueError: bad -> backoff: close crash, save")
    assert "ValueError: bad" in line.machine.reason
    line.play("tick -> starting: save, spawn 2 batch 8 of 8 save 1")
    assert line.machine.reason == ""
    rules, script = WAITING["a machine in distress is waited for even before the first start"]
    assert "waiting for memory" in Timeline(rules).play(script.split("machine 9000 warn")[0]).machine.reason


def test_an_autopsy_is_no_hang() -> None:
    line = Timeline(policy(autopsy=True, autopsy_limit_s=40.0, hang_timeout_s=30.0)).play("""
        start                       -> starting: save, spawn 1 batch 8 of 8
        ready                       -> running
        steps 18 grow=50            -> running: ask autopsy
        early after=65              -> running
        autopsied a list            -> running
        steps 1 grow=50             -> running
        early after=29              -> running
        tick after=0                -> terminating: dump, term
    """)
    assert "30 s" in line.says("hang")[0]
