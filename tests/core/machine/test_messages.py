"""Messages, reasons and records that a golden timeline cannot show."""

import json

from tests.core.machine.golden_device import DEVICE
from tests.core.machine.golden_ends import ENDS, RUNNING
from tests.core.machine.golden_ladder import LADDER
from tests.core.machine.golden_memory import MEMORY
from tests.core.machine.golden_waiting import WAITING
from tests.core.machine.timeline import MachineTimeline, policy, show
from tests.core.policies import memory_policy, run_policy

from mlx_supervisor.core import actions as ac
from mlx_supervisor.core import events as ev
from mlx_supervisor.core.machine.machine import apply
from mlx_supervisor.core.machine.run_state import Run
from mlx_supervisor.core.machine.states import State
from mlx_supervisor.core.policy import MIB

GOLDEN = MEMORY | DEVICE | LADDER | WAITING | ENDS


def test_the_error_of_a_crash_is_in_the_reason() -> None:
    line = MachineTimeline(policy(max_without_progress=1)).play(
        RUNNING + "exit 1 ValueError: bad -> fatal: close crash, save, finish failed"
    )
    assert "ValueError: bad" in line.machine.reason


def test_a_stop_request_s_reason_replaces_the_trip_s() -> None:
    line = MachineTimeline().play("""
        start                       -> starting: save, spawn 1 batch 8 of 8
        ready                       -> running
        steps 40 grow=50            -> draining: ask stop
        stop going home             -> draining: save
        exit 75                     -> stopped: close memory leak, save, finish stopped
    """)
    assert line.machine.reason == "stop requested (going home)"


def test_a_very_long_reason_still_fits_a_frame() -> None:
    line = MachineTimeline().play(RUNNING)
    done = line.feed(ev.Command(line.at_s, ev.CommandKind.STOP, "x" * 100_000))
    reasons = [action.reason for action in done if isinstance(action, ac.RequestStop)]
    assert len(reasons) == 1
    assert len(reasons[0]) <= 512


def test_every_action_can_be_shown() -> None:
    shown = {
        type(action) for rules, script in GOLDEN.values() for action in MachineTimeline(rules).play(script).actions
    }
    assert {each.__name__ for each in shown} == {each.__name__ for each in ac.Action.__subclasses__()}
    assert show(ac.Kill(1, "")) == "kill"


def test_a_hard_trip_kills_before_its_notice() -> None:
    machine = Run(run_policy(memory_policy(limit_bytes=100 * MIB)))
    apply(machine, ev.Command(0.0, ev.CommandKind.START))
    apply(machine, ev.Spawned(0.1, 1, pid=7))
    apply(machine, ev.Ready(0.2, 1, step=0, target_steps=10, batch_size=1, effective_batch=1))
    apply(machine, ev.Sample(0.3, 1, 200 * MIB, 0, 1))
    actions = apply(machine, ev.Sample(0.31, 1, 200 * MIB, 0, 1))
    assert isinstance(actions[0], ac.Kill)
    assert any(isinstance(action, ac.Notice) for action in actions[1:])


def _records(line: MachineTimeline) -> list[dict[str, object]]:
    return [dict(action.record) for action in line.actions if isinstance(action, ac.CloseGeneration)]


def test_a_generation_s_record_has_its_error_autopsy_and_gradient_checkpointing() -> None:
    line = MachineTimeline(policy(autopsy=True, size=1, backoff_s=0.0)).play("""
        start                       -> starting: save, spawn 1 batch 1 of 1
        ready can=yes               -> running
        steps 18 grow=50            -> running: ask autopsy
        autopsied a list, a dict    -> running
        exit 1 RuntimeError: [malloc] Unable to allocate 9 bytes. -> starting: close device out of memory, save, spawn 2 batch 1 of 1 save 9 recompute
        ready can=yes               -> running
        exit 1 KeyError: 7          -> starting: close crash, save, spawn 3 batch 1 of 1 save 9 recompute
        ready can=yes               -> running
        stop                        -> draining: save, ask stop
        exit 75                     -> stopped: close requested, save, finish stopped
    """)  # noqa: E501
    first, second, third = _records(line)
    assert (first["autopsy"], first["gradient_checkpointing"]) == (["a list", "a dict"], False)
    assert "Unable to allocate" in str(first["error"])
    assert (second["autopsy"], second["gradient_checkpointing"], third["error"]) == ([], True, "")
    assert "KeyError: 7" in str(second["error"])
    assert line.machine.history.autopsy == ["a list", "a dict"]
    assert line.machine.history.error == "", "a generation has been ready since"
    json.dumps(_records(line))


def test_a_task_without_gradient_checkpointing_is_reported_as_such() -> None:
    line = MachineTimeline(policy(gradient_checkpointing="always", max_without_progress=1)).play("""
        start                       -> starting: save, spawn 1 batch 8 of 8 recompute
        ready                       -> running
        exit 1                      -> fatal: close crash, save, finish failed
    """)
    assert [record["gradient_checkpointing"] for record in _records(line)] == [False]
    assert "(requested, but not supported by this task)" in line.texts("ready")[0]


AUTOPSY_REQUESTED = """
    start                       -> starting: save, spawn 1 batch 8 of 8
    ready                       -> running
    steps 18 grow=50            -> running: ask autopsy
"""


def test_one_autopsy_report_is_accepted_per_request() -> None:
    line = MachineTimeline(policy(autopsy=True)).play(RUNNING)
    line.feed(ev.Autopsied(line.at_s, 1, 3, ("unrequested",), 1.0))
    assert line.machine.history.autopsy == line.texts("autopsy") == []
    line = MachineTimeline(policy(autopsy=True)).play(AUTOPSY_REQUESTED)
    for number in range(1000):
        line.feed(ev.Autopsied(line.at_s, 1, 18, (f"answer {number}",), 1.0))
    assert line.machine.history.autopsy == ["answer 0"]
    assert len(line.texts("autopsy")) == 1


def test_a_stop_during_a_trip_keeps_the_trip_as_the_error() -> None:
    for verb in ("stop", "kill", "suspend"):
        line = MachineTimeline().play(RUNNING)
        line.feed(ev.Sample(line.at_s, 1, 2300 * MIB, 0, 1))
        line.feed(ev.Sample(line.at_s, 1, 2300 * MIB, 0, 1))
        assert line.machine.state is State.KILLING
        line.feed(ev.Command(line.at_s, ev.CommandKind(verb), "enough"))
        line.feed(ev.Exited(line.at_s, 1, None, 9))
        assert line.machine.state is State.STOPPED
        assert "enough" in line.machine.reason
        assert (_records(line)[0]["cause"], line.machine.batch.size) == ("memory pressure", 4)
        assert _records(line)[0]["error"] == line.machine.history.error == "used 2,300 MiB, limit 2,200"


def test_a_restart_during_a_trip_explains_the_halved_batch() -> None:
    line = MachineTimeline().play(RUNNING)
    for event in (
        ev.Sample(line.at_s, 1, 2300 * MIB, 0, 1),
        ev.Sample(line.at_s, 1, 2300 * MIB, 0, 1),
        ev.Command(line.at_s, ev.CommandKind.STOP, "enough"),
        ev.Command(line.at_s, ev.CommandKind.START, "restart it"),
        ev.Exited(line.at_s, 1, None, 9),
    ):
        line.feed(event)
    assert line.machine.state is State.STARTING
    assert line.texts("restart") == [
        "Used 2,300 MiB, limit 2,200: worker killed; restarting with batch 4 × 2, 3 steps lost."
    ]
    assert "enough" not in line.texts("restart")[0]


def test_a_late_autopsy_of_the_previous_generation_is_ignored() -> None:
    line = MachineTimeline(policy(autopsy=True)).play(AUTOPSY_REQUESTED)
    line.play("""
        exit 1                      -> backoff: close crash, save
        tick                        -> starting: save, spawn 2 batch 8 of 8 save 9
        ready                       -> running
        autopsied late              -> running
    """)
    assert line.texts("autopsy") == []


def test_a_failed_start_gives_its_reason_while_it_waits() -> None:
    line = MachineTimeline().play("start -> starting: save, spawn 1 batch 8 of 8")
    line.feed(ev.ActionFailed(line.at_s, "spawn", "[Errno 28] No space left on device", passing=True))
    assert line.machine.state is State.BACKOFF
    assert "No space left on device; next attempt in 1 s" in line.machine.reason
    assert "No space left" in str(_records(line)[-1]["error"])


def test_autopsy_findings_are_bounded() -> None:
    line = MachineTimeline(policy(autopsy=True)).play(AUTOPSY_REQUESTED)
    line.feed(ev.Autopsied(line.at_s, 1, 3, tuple("x" * 9999 for _ in range(99)), 1.0))
    assert len(line.texts("autopsy")) == len(line.machine.history.autopsy) == 24
    assert max(len(each) for each in line.machine.history.autopsy) <= 300


def test_a_waiting_run_gives_its_reason() -> None:
    line = MachineTimeline().play(RUNNING + "exit 1 ValueError: bad -> backoff: close crash, save")
    assert "ValueError: bad" in line.machine.reason
    line.play("tick -> starting: save, spawn 2 batch 8 of 8 save 1")
    assert line.machine.reason == ""
    line = MachineTimeline().play("""
        machine 9000 critical       -> stopped
        start                       -> waiting: save
    """)
    assert "waiting for memory" in line.machine.reason


def test_an_autopsy_is_not_a_hang() -> None:
    line = MachineTimeline(policy(autopsy=True, autopsy_limit_s=40.0, hang_timeout_s=30.0)).play("""
        start                       -> starting: save, spawn 1 batch 8 of 8
        ready                       -> running
        steps 18 grow=50            -> running: ask autopsy
        early after=65              -> running
        autopsied a list            -> running
        steps 1 grow=50             -> running
        early after=29              -> running
        tick after=0                -> terminating: dump, term
    """)
    assert "30 s" in line.texts("hang")[0]


def test_a_checkpoint_that_a_killed_worker_did_not_report_counts() -> None:
    line = MachineTimeline().play("""
        start                       -> starting: save, spawn 1 batch 8 of 8
        ready                       -> running
        steps 9                     -> running
    """)
    run, at_s = line.machine, line.at_s + 1
    said = [
        each.text for each in apply(run, ev.Exited(at_s, 1, None, 9, durable_step=8)) if isinstance(each, ac.Notice)
    ]
    assert any("1 step lost" in text for text in said), said
    assert run.history.durable_step == 8
    assert run.history.tighter_steps is None, "it saved something"
