"""Nothing finished is lost: full disks, deleted folders and unwritable output folders, at any time."""

import shutil
import signal
import time

import pytest

from mlx_supervisor import wire

AT_THE_END = {"every_steps": 0, "every_seconds": 0.0, "overhead": 0.0}


def waiting(worker):
    return worker.until(wire.PhaseChange, lambda message: message.waiting_for)


def full_disk(supervisor, name, checkpoint=AT_THE_END, **args):
    """A run of 6 updates whose disk is full from the 4th on."""
    args = {"flag": str(supervisor.folder / "flag"), "from_step": 4, **args}
    return supervisor.job(name, entry="slow_disk:full", steps=6, args=args, checkpoint=checkpoint)


def test_the_last_checkpoint_waits_for_room_and_no_update_is_trained_twice(supervisor):
    calm = supervisor.run(supervisor.job(steps=6, checkpoint=AT_THE_END))
    worker = supervisor.start(full_disk(supervisor, "full"))
    wait = waiting(worker)
    assert (
        "save step 6 (cannot write model.safetensors: No space left on device (ENOSPC); it needs 2 MiB"
        in wait.waiting_for
    )
    assert f"the result is already in {worker.folder / 'export'}" in wait.waiting_for
    assert (worker.folder / "export" / "done.txt").exists(), "that disk has room"
    assert worker.saved_steps == []
    (supervisor.folder / "flag").unlink()
    assert worker.wait() == wire.EXIT_COMPLETED
    assert worker.saved_steps == [6]
    assert [step.step for step in worker.steps] == [1, 2, 3, 4, 5, 6]
    assert [(report.step, report.ok) for report in worker.of(wire.Checkpoint)] == [(6, False), (6, True)]
    assert worker.of(wire.PhaseChange)[-1].waiting_for == "", "the wait is over"
    assert worker.bye.weights_sha256 == calm.bye.weights_sha256


def test_a_stop_ends_the_wait_and_names_what_is_lost(supervisor):
    every = AT_THE_END | {"every_steps": 2}
    worker = supervisor.start(full_disk(supervisor, "stopped", every, pause_s=0.1))
    waiting(worker)
    worker.send(wire.Stop, reason="enough")
    assert worker.wait() == wire.EXIT_STOPPED
    assert worker.bye.lost.endswith("reserve of 1 MiB): the next start trains steps 3 to 6 again")
    assert worker.bye.lost.startswith("step 6 not saved (")
    assert worker.bye.reason == "enough"
    assert worker.saved_steps == [2]


def full_at_4(supervisor, name, grace_s=60.0):
    """A run whose disk fills up after update 4, which is when it is told to stop."""
    args = {"flag": str(supervisor.folder / "flag"), "from_step": 4, "pause_s": 0.2}
    job = supervisor.job(name, entry="slow_disk:full", steps=500, args=args, checkpoint=AT_THE_END, grace_s=grace_s)
    worker = supervisor.start(job)
    worker.until(wire.Step, lambda message: message.step >= 4)
    return worker


def test_a_soft_trip_on_a_full_disk_waits_and_no_update_is_trained_twice(supervisor):
    worker = full_at_4(supervisor, "tripped")
    worker.send(wire.Stop, reason="memory grows", waits=True)
    wait = waiting(worker)
    assert "it is in memory, a stop loses it" in wait.waiting_for
    assert worker.process.poll() is None
    (supervisor.folder / "flag").unlink()
    assert worker.wait() == wire.EXIT_STOPPED
    assert worker.bye.lost == ""
    assert worker.saved_steps == [worker.bye.step]
    assert worker.of(wire.PhaseChange)[-1].waiting_for == "", "the wait is over"


def test_the_wait_of_a_soft_trip_reports_more_often_than_the_grace_period(supervisor):
    """The supervisor sends SIGTERM to a worker that is silent for that long."""
    worker = full_at_4(supervisor, "reports", grace_s=2.0)
    worker.send(wire.Stop, reason="memory grows", waits=True)
    waiting(worker)
    begun_s = time.monotonic()
    for _ in range(3):
        last = worker.messages[-1].seq
        worker.until(wire.PhaseChange, lambda message, last=last: message.seq > last and message.waiting_for)
    assert time.monotonic() - begun_s < 5.0, "1.5 s on an idle machine"


def test_a_stop_ends_the_wait_of_a_soft_trip(supervisor):
    worker = full_at_4(supervisor, "impatient")
    worker.send(wire.Stop, reason="memory grows", waits=True)
    waiting(worker)
    worker.send(wire.Stop, reason="enough")
    assert worker.wait() == wire.EXIT_STOPPED
    assert "trains steps 1 to" in worker.bye.lost
    assert worker.bye.reason == "memory grows"


@pytest.mark.parametrize("room", [True, False])
def test_a_stop_waits_for_the_disk_within_the_grace_period(supervisor, room):
    worker = full_at_4(supervisor, f"stop-{room}", grace_s=60.0 if room else 3.0)
    worker.send(wire.Stop, reason="enough")
    wait = waiting(worker)
    assert "a stop waits at most half of restart.stop_grace_s" in wait.waiting_for
    if room:
        (supervisor.folder / "flag").unlink()
    assert worker.wait() == wire.EXIT_STOPPED, "at the latest after half the grace period"
    assert (worker.bye.lost == "", worker.saved_steps == [worker.bye.step]) == (room, room)


def test_the_death_of_the_supervisor_leaves_the_wait_a_part_of_the_grace_period(supervisor):
    worker = supervisor.start(full_disk(supervisor, "orphan"))
    waiting(worker)
    worker.sever()
    (supervisor.folder / "flag").unlink()
    assert worker.wait() == wire.EXIT_COMPLETED
    assert (worker.folder / "checkpoints" / "step-000000006").is_dir()


def test_after_its_longest_wait_the_worker_gives_up_without_a_restart(supervisor):
    worker = supervisor.run(full_disk(supervisor, "patience", give_up_s=0.3))
    assert worker.process.returncode == wire.EXIT_REFUSED
    assert "gave up after" in worker.bye.reason
    assert "trains steps 1 to 6 again" in worker.bye.reason


def test_a_wait_reports_more_often_than_a_short_hang_timeout(supervisor):
    job = full_disk(supervisor, "heartbeats")
    job = type(job)(**{name: getattr(job, name) for name in job.__struct_fields__} | {"hang_timeout_s": 1.0})
    worker = supervisor.start(job)
    first = waiting(worker)
    for _ in range(8):
        last = worker.messages[-1].seq
        worker.until(wire.PhaseChange, lambda message, last=last: message.seq > last and message.waiting_for)
    assert worker.process.poll() is None, "2 s: the watchdog's bound is 1.5 s"
    assert len(worker.of(wire.Checkpoint)) == 1, f"one report of the failure: {first}"
    worker.signal(signal.SIGTERM)
    assert worker.wait() == wire.EXIT_STOPPED


def test_an_error_of_the_export_itself_costs_no_checkpoint(supervisor):
    worker = supervisor.start(full_disk(supervisor, "both", fail_export=True))
    waiting(worker)
    assert worker.process.poll() is None
    (supervisor.folder / "flag").unlink()
    assert worker.wait() == wire.EXIT_FAILED
    assert worker.bye.reason == "OSError: no space for the export"
    assert worker.saved_steps == [6]


def test_an_output_folder_that_becomes_unwritable_is_waited_for_and_costs_no_update(supervisor):
    out = supervisor.folder / "results"
    job = {"entry": "slow_disk:full", "steps": 6, "checkpoint": AT_THE_END}
    args = {"flag": str(supervisor.folder / "flag"), "from_step": 4, "export_dir": str(out)}
    first = supervisor.start(supervisor.job("out", args=args, **job))
    wait = waiting(first)
    assert (
        wait.waiting_for == f"{out} to export the result (File exists (EEXIST)); step 6 is saved, a stop loses nothing"
    )
    assert first.saved_steps == [6]
    first.signal(signal.SIGKILL)
    first.wait()
    second = supervisor.start(supervisor.job("out", generation=2, args=args, **job))
    waiting(second)
    assert any("Task.export_dir: cannot write to" in note for note in second.ready.notes), "it resumes with a note"
    out.unlink()
    assert second.wait() == wire.EXIT_COMPLETED
    assert second.steps == []
    assert (out / "done.txt").exists()


def test_an_unwritable_output_folder_is_refused_before_the_first_update(supervisor):
    (supervisor.folder / "results").write_text("a file in the way")
    args = {"flag": str(supervisor.folder / "flag"), "export_dir": str(supervisor.folder / "results")}
    worker = supervisor.run(supervisor.job(entry="slow_disk:full", args=args))
    assert worker.process.returncode == wire.EXIT_REFUSED
    assert worker.steps == []
    assert worker.bye.reason.endswith(
        f"slow_disk:full: Task.export_dir: cannot write to {supervisor.folder / 'results'}: it is not a folder; "
        "choose a folder that can be written"
    )


def test_too_little_room_is_refused_at_the_first_start_and_noted_at_a_restart(supervisor):
    task = {"entry": "slow_disk:cramped", "checkpoint": AT_THE_END}
    refused = supervisor.run(supervisor.job("cramped", args={"free_mib": 10}, **task))
    assert refused.process.returncode == wire.EXIT_REFUSED
    assert refused.bye.reason.startswith(
        "disk nearly full (needs 66 MiB for a checkpoint including a reserve of 64 MiB; 10 MiB free): free space on"
    )
    roomy = supervisor.run(supervisor.job("cramped", args={"free_mib": 500}, steps=6, **task))
    assert (roomy.process.returncode, roomy.ready.notes) == (wire.EXIT_COMPLETED, [])
    resumed = supervisor.run(supervisor.job("cramped", args={"free_mib": 10}, steps=8, generation=2, **task))
    assert any("disk nearly full (needs 66 MiB for a checkpoint" in note for note in resumed.ready.notes)
    assert [step.step for step in resumed.steps] == [7, 8], "it trains on, and the last checkpoint may use the reserve"
    assert resumed.process.returncode == wire.EXIT_COMPLETED


def test_a_disk_without_room_for_all_checkpoints_that_are_kept_is_noted(supervisor):
    job = {"entry": "slow_disk:cramped", "steps": 1}
    args = {"hidden": 100_000, "free_mib": 64 + 30}  # a checkpoint has 14 MiB
    worker = supervisor.run(supervisor.job(args=args, checkpoint=AT_THE_END | {"keep": 5}, **job))
    (note,) = worker.ready.notes
    assert "has room for 2 checkpoints of 14 MiB, checkpoint.keep = 5 needs 5: free 41 MiB" in note


@pytest.mark.parametrize("folder", ["checkpoints", "."])
def test_a_deleted_folder_is_made_again_and_training_continues(supervisor, folder):
    every = AT_THE_END | {"every_steps": 5}
    worker = supervisor.start(supervisor.job(steps=100_000, args={"pause_s": 0.01}, checkpoint=every))
    first = worker.until(wire.Checkpoint, lambda message: message.ok)
    shutil.rmtree((worker.folder / folder).resolve().rename(supervisor.folder / "deleted"))
    made = worker.until(wire.Checkpoint, lambda message: message.notes)
    assert made.ok
    assert "checkpoints was deleted during the run" in made.notes[0]
    worker.until(wire.Checkpoint, lambda message: message.ok and message.step > made.step)
    worker.send(wire.Stop)
    assert worker.wait() == wire.EXIT_STOPPED
    assert worker.saved_steps[-1] == worker.bye.step > first.step
    assert sum(len(report.notes) for report in worker.of(wire.Checkpoint)) == 1
