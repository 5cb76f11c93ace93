"""Speed and leak figures of a run, from its machine to `supervisorctl`."""

import json
from types import SimpleNamespace
from typing import cast

import pytest
from tests.core.machine.golden_ends import COMPLETED
from tests.core.machine.timeline import MachineTimeline, policy

from mlx_supervisor.control.backend import ProcessState, RunInfo
from mlx_supervisor.control.structs import description
from mlx_supervisor.core import events as ev
from mlx_supervisor.core.history import RunHistory
from mlx_supervisor.core.policy import MIB
from mlx_supervisor.daemon.control_adapter import DaemonBackend, run_info
from mlx_supervisor.daemon.daemon import Daemon
from mlx_supervisor.daemon.run import SupervisedRun

LIMIT_MIB = 20_000
ROOM_STEPS = LIMIT_MIB / 10 - 350


def info_after_steps(grow_mib: float) -> RunInfo:
    """After 300 steps of 0.3 s from 500 MiB on, each of which adds `grow_mib` to MLX's active memory."""
    timeline = MachineTimeline(policy(limit_bytes=LIMIT_MIB * MIB))
    timeline.play("start -> starting: save, spawn 1 batch 8 of 8\nready -> running")
    timeline.play(f"steps 300 grow={grow_mib} -> running")
    return run_info(cast(SupervisedRun, SimpleNamespace(machine=timeline.machine)))


def test_a_leak_is_reported_by_cause_with_the_steps_and_the_time_to_the_limit() -> None:
    info = info_after_steps(grow_mib=10)
    assert info["leak"] == "leaking"
    assert info["leak_bytes_per_step"] == pytest.approx(10 * MIB, rel=0.02)
    by_cause = info["leak_by_cause_bytes_per_step"]
    assert by_cause is not None
    assert by_cause.keys() == {"arrays", "cache", "native"}
    assert by_cause["arrays"] == pytest.approx(10 * MIB, rel=0.02)
    assert by_cause["cache"] == by_cause["native"] == 0
    assert info["steps_to_limit"] == pytest.approx(ROOM_STEPS, rel=0.02)
    assert info["seconds_to_limit"] == pytest.approx(ROOM_STEPS * 0.3, rel=0.02)


def test_without_growth_there_is_no_time_to_the_limit() -> None:
    info = info_after_steps(grow_mib=0)
    assert info["leak"] == ""
    assert info["leak_bytes_per_step"] == 0
    assert info["steps_to_limit"] is info["seconds_to_limit"] is None


def test_status_and_info_show_the_leak(ctl, backend) -> None:
    backend.infos["night"] = info = info_after_steps(grow_mib=10)
    assert f", leak 10.0 MiB/step, limit in {info['steps_to_limit']:,.0f} steps (8m1" in ctl("status", "night").out
    shown = json.loads(ctl("info", "night").out)
    for key in ("leak_by_cause_bytes_per_step", "steps_to_limit", "seconds_to_limit"):
        assert shown[key] == info[key]


def test_status_and_info_show_the_validation_loss(ctl, backend) -> None:
    timeline = MachineTimeline(policy())
    timeline.play("start -> starting: save, spawn 1 batch 8 of 8\nready -> running\nsteps 1 -> running")
    run = cast(SupervisedRun, SimpleNamespace(machine=timeline.machine))
    assert run_info(run)["validation_loss"] is run_info(run)["validation_step"] is None
    timeline.feed(ev.ValidationReport(timeline.at_s, 1, 1, 2.25))
    backend.infos["night"] = run_info(run)
    assert ", validation loss 2.25 at step 1 (best), " in ctl("status", "night").out
    shown = json.loads(ctl("info", "night").out)
    assert (shown["validation_loss"], shown["validation_step"]) == (2.25, 1)
    timeline.feed(ev.ValidationReport(timeline.at_s, 1, 3, 2.308))
    backend.infos["night"] = run_info(run)
    assert ", validation loss 2.308 at step 3 (best 2.25 at step 1), " in ctl("status", "night").out
    shown = json.loads(ctl("info", "night").out)
    assert (shown["best_validation_loss"], shown["best_validation_step"], shown["smoothed_loss"]) == (2.25, 1, 1)


def test_speed_and_time_left_are_over_wall_time_and_absent_unless_the_worker_trains(ctl, backend) -> None:
    timeline = MachineTimeline(policy())
    run = cast(SupervisedRun, SimpleNamespace(machine=timeline.machine))
    timeline.play("start -> starting: save, spawn 1 batch 8 of 8\nready -> running\nsteps 1 -> running")
    assert not {"tokens_per_s", "eta_s"} & run_info(run).keys()
    timeline.play("phase eval after=19.4 -> running\nsteps 1 -> running\nphase train -> running\nsteps 1 -> running")
    info = backend.infos["night"] = run_info(run)
    assert info["tokens_per_s"] == pytest.approx(200 / 20.3)
    assert info["eta_s"] == pytest.approx(997 * 20.3 / 2)
    assert " step 3/1000, 10 tokens/s, 2 h 49 min left, done about " in ctl("status", "night").out
    timeline.play("stop -> draining: save, ask stop")
    assert not {"tokens_per_s", "eta_s"} & run_info(run).keys()


def test_status_and_info_name_what_a_run_does_unless_it_trains(ctl, backend) -> None:
    timeline = MachineTimeline(policy())
    run = cast(SupervisedRun, SimpleNamespace(machine=timeline.machine))

    def shown(script: str) -> str:
        timeline.play(script)
        backend.infos["night"] = run_info(run)
        activity = json.loads(ctl("info", "night").out)["activity"]
        assert (f"({activity})" in ctl("status", "night").out) == (activity != "training")
        return activity

    assert shown("start -> starting: save, spawn 1 batch 8 of 8") == "loading the model"
    assert shown("ready -> running") == "compiling the first update"
    assert shown("phase eval -> running") == "evaluating"
    assert shown("phase train -> running") == "compiling the first update"
    assert shown("steps 2 -> running") == "training"
    assert shown("phase checkpoint -> running") == "saving a checkpoint"
    assert shown("phase train -> running") == "training"
    assert shown("stop -> draining: save, ask stop") == "saving a checkpoint to stop"


def test_a_completed_run_whose_later_start_was_refused_stays_exited_with_the_refusal() -> None:
    """With the daemon that started it, and with a later one."""
    timeline = MachineTimeline(policy()).play(
        COMPLETED
        + """
        start                       -> starting: save, spawn 2 batch 8 of 8
        bye refused seed changed    -> starting
        exit 78                     -> fatal: close refused its job, save, finish failed
    """
    )
    later = MachineTimeline(policy(), RunHistory.restore(timeline.machine.snapshot()))
    for machine in (timeline.machine, later.machine):
        worker = SimpleNamespace(started_wall_s=9.0, stopped_wall_s=9.0, exit_status=78)
        run = SimpleNamespace(name="night", machine=machine, pid=None, worker=worker)
        (info,) = DaemonBackend(cast(Daemon, SimpleNamespace(runs={"night": run}))).processes()
        assert info.state is ProcessState.EXITED
        assert description(info, 10.0) == "last start refused: seed changed"
    timeline.play("start -> starting: save, spawn 3 batch 8 of 8")
    (info,) = DaemonBackend(
        cast(
            Daemon,
            SimpleNamespace(
                runs={"night": SimpleNamespace(name="night", machine=timeline.machine, pid=7, worker=worker)}
            ),
        )
    ).processes()
    assert (info.state, info.detail) == (ProcessState.STARTING, "")
