"""A worker under commands, drills, without a supervisor, and with a full disk."""

import os
import signal
import subprocess
import sys

import pytest
import zmq

from mlx_supervisor import wire
from mlx_worker.supervision.link import SEND_QUEUE_FRAMES, Link

MIB = 2**20
ENDLESS = {"steps": 100_000}


def until_hung(worker):
    """By its stacks: the last step's report comes before the hang."""
    worker.until(wire.Step)
    while "drills.py" not in worker.stderr:
        assert worker.process.poll() is None, worker.stderr
        worker.signal(signal.SIGUSR1)
        worker.supervisor.receive(0.05)


def test_commands_are_answered_while_training(supervisor):
    worker = supervisor.start(supervisor.job(**ENDLESS, checkpoint={"every_steps": 50, "every_seconds": 0}))
    worker.until(wire.Step)
    worker.send(wire.ClearCache)
    assert worker.until(wire.Cleared).active_bytes > 0
    saved = worker.until(wire.Checkpoint)
    assert saved.ok
    assert saved.size_bytes > 1000
    assert saved.step % 50 == 0
    worker.until(wire.Step, lambda message: message.step == saved.step + 3)
    worker.send(wire.Stop)
    assert worker.wait() == wire.EXIT_STOPPED


def test_malformed_commands_are_dropped(supervisor):
    worker = supervisor.start(supervisor.job(**ENDLESS))
    worker.until(wire.Step)
    stop = wire.Stop(run=worker.job.run, generation=1, seq=0)
    stranger = wire.encode(wire.Stop(run="other", generation=1, seq=0))
    older = wire.encode(wire.Stop(run=worker.job.run, generation=9, seq=0))
    for frames in ([b""], [b"\xc1garbage"], [os.urandom(2000)], [wire.encode(stop), b"more"], [stranger], [older]):
        worker.send_raw(*frames)
    worker.send(wire.ClearCache)
    cleared = worker.until(wire.Cleared)
    worker.until(wire.Step, lambda message: message.seq > cleared.seq + 3)
    assert worker.process.poll() is None
    worker.send(wire.Stop, reason="now truly")
    assert worker.wait() == wire.EXIT_STOPPED
    assert worker.bye.reason == "now truly"


def test_a_supervisor_that_reads_nothing_never_blocks_training(supervisor):
    """Without a receiver the queue fills, frames are dropped and counted, and the run completes."""
    job = supervisor.job(steps=1300, telemetry=f"ipc://{supervisor.folder}/absent.sock")
    worker = supervisor.start(job)
    assert worker.process.wait(60) == wire.EXIT_COMPLETED
    assert worker.saved_steps == [1300]


def test_dropped_frames_are_counted(supervisor):
    endpoint = f"ipc://{supervisor.folder}/late.sock"
    link = Link("late", 1, endpoint)
    for step in range(SEND_QUEUE_FRAMES + 5):
        link.send(wire.PhaseChange, phase="train", detail=f"step {step}" * 100)
    assert link.dropped == 5
    late = supervisor.context.socket(zmq.ROUTER)
    late.bind(endpoint)
    try:
        seen = [wire.decode_worker(late.recv_multipart()[1]) for _ in range(SEND_QUEUE_FRAMES) if late.poll(10_000)]
        assert [message.seq for message in seen] == list(range(SEND_QUEUE_FRAMES))
        link.send(wire.Bye, outcome="failed", reason="\ud800" + "x" * 100_000, step=1)
        assert late.poll(10_000)
        last = wire.decode_worker(late.recv_multipart()[1])
        assert last.seq == SEND_QUEUE_FRAMES + 5, "the gap shows how many are missing"
        assert last.reason == "?" + "x" * 4095
    finally:
        link.close()
        late.close(0)


def test_second_signal_exits_at_once(supervisor):
    worker = supervisor.start(supervisor.job(drill={"hang_at_step": 2}))
    until_hung(worker)
    worker.signal(signal.SIGTERM)
    worker.signal(signal.SIGINT)
    assert worker.wait() in (128 + signal.SIGTERM, 128 + signal.SIGINT)
    assert worker.saved_steps == []


def test_ignore_sigterm_drill(supervisor):
    worker = supervisor.start(supervisor.job(drill={"ignore_sigterm": True}, **ENDLESS))
    worker.until(wire.Step)
    worker.signal(signal.SIGTERM)
    worker.signal(signal.SIGTERM)
    seen = worker.steps[-1].step
    worker.until(wire.Step, lambda message: message.step > seen + 50)
    worker.signal(signal.SIGINT)
    assert worker.wait() == wire.EXIT_STOPPED


def test_crash_drill_dies_before_the_update(supervisor):
    job = {"drill": {"crash_at_step": 3, "generations": [1]}, "checkpoint": {"every_steps": 1, "every_seconds": 0}}
    worker = supervisor.run(supervisor.job("crash", steps=4, **job))
    assert worker.process.returncode == wire.EXIT_FAILED
    assert [message.step for message in worker.steps] == [1, 2]
    assert (worker.bye.outcome, worker.bye.step) == ("failed", 2)
    assert worker.bye.reason == "DrillError: drill: crash at step 3"
    assert "Traceback" in worker.stderr
    assert worker.saved_steps == [1, 2]
    second = supervisor.run(supervisor.job("crash", steps=4, generation=2, **job))
    assert second.process.returncode == wire.EXIT_COMPLETED, "generation 2 is not drilled"


@pytest.mark.parametrize("kind", ["arrays", "native"])
def test_leak_drill_is_resident_and_changes_no_number(supervisor, kind):
    clean = supervisor.run(supervisor.job(steps=6))
    drill = {"leak_mib_per_step": 8.0, "leak_from_step": 3, "leak_kind": kind}
    drill |= {"allocate_mib": 32, "allocate_at_step": 6}
    leaking = supervisor.run(supervisor.job(steps=6, drill=drill))
    assert leaking.bye.weights_sha256 == clean.bye.weights_sha256
    resident = [message.resident_bytes for message in leaking.steps]
    active = [message.active_bytes for message in leaking.steps]
    assert resident[4] - resident[1] > 20 * MIB
    assert resident[5] - resident[4] > 36 * MIB
    assert (active[5] - active[1] > 60 * MIB) == (kind == "arrays")


def test_hang_drill_shows_stacks_and_ends_itself(supervisor):
    worker = supervisor.start(supervisor.job(drill={"hang_at_step": 2}, hang_timeout_s=1.5))
    until_hung(worker)
    assert wire.HANG_LINE not in worker.stderr, "SIGUSR1 alone shows the stacks"
    assert worker.wait() == wire.EXIT_HANG
    assert wire.HANG_LINE in worker.stderr


def test_a_native_hang_without_a_supervisor_ends_itself(supervisor):
    drill = {"hang_at_step": 2, "hang_kind": "native"}
    worker = supervisor.start(supervisor.job(drill=drill, hang_timeout_s=1.5), bare=True)
    assert worker.wait() == wire.EXIT_FAILED, "Python's fault handler needs no interpreter lock"
    assert "drills.py" in worker.stderr.partition("Timeout")[2]


def test_orphaned_and_hung_worker_ends_itself(supervisor):
    worker = supervisor.start(supervisor.job(drill={"hang_at_step": 2}, grace_s=0.3))
    until_hung(worker)
    worker.sever()
    assert worker.wait() == -signal.SIGKILL


def test_slow_start_sends_hello_first_and_obeys_a_stop(supervisor):
    worker = supervisor.start(supervisor.job(drill={"slow_start_s": 600.0}))
    worker.until(wire.PhaseChange)
    assert [type(message) for message in worker.messages] == [wire.Hello, wire.PhaseChange]
    worker.signal(signal.SIGTERM)
    assert worker.wait() == wire.EXIT_STOPPED
    assert (worker.bye.outcome, worker.bye.step) == ("stopped", 0)
    assert worker.saved_steps == []


def test_a_failed_checkpoint_is_reported_and_the_run_continues(supervisor):
    job = supervisor.job(steps=400, args={"pause_s": 0.01}, checkpoint={"every_steps": 5, "every_seconds": 0})
    worker = supervisor.start(job)
    worker.until(wire.Checkpoint, lambda message: message.ok)
    checkpoints = worker.folder / "checkpoints"
    moved = checkpoints.rename(worker.folder / "moved")
    checkpoints.write_text("a file in the way")
    failed = worker.until(wire.Checkpoint, lambda message: not message.ok)
    assert "checkpoints" in failed.error
    worker.until(wire.Step, lambda message: message.step > failed.step + 1)
    checkpoints.unlink()
    moved.rename(checkpoints)
    worker.until(wire.Checkpoint, lambda message: message.ok and message.step > failed.step)
    worker.send(wire.Stop)
    assert worker.wait() == wire.EXIT_STOPPED
    assert worker.saved_steps[-1] == worker.bye.step


def test_weights_that_are_not_finite_are_never_saved(supervisor):
    job = {"checkpoint": {"every_steps": 2, "every_seconds": 0}, "stop_on_not_finite": False}
    worker = supervisor.run(supervisor.job(steps=4, args={"nan": True}, **job))
    assert worker.process.returncode == wire.EXIT_FAILED, "not completed: the loss is not finite"
    assert [message.ok for message in worker.of(wire.Checkpoint)] == [False, False]
    assert all("NaN or infinity" in message.error for message in worker.of(wire.Checkpoint))
    assert worker.steps[0].loss != worker.steps[0].loss, "a NaN loss is reported as it is"
    assert "NaN or infinity" in worker.bye.reason
    assert worker.saved_steps == []


def test_a_failed_export_is_no_completion_but_loses_nothing(supervisor):
    first = supervisor.run(supervisor.job("export", steps=2, args={"fail_export": True}))
    assert first.process.returncode == wire.EXIT_FAILED
    assert first.bye.reason == "OSError: no space for the export"
    second = supervisor.run(supervisor.job("export", steps=2, generation=2))
    assert second.process.returncode == wire.EXIT_COMPLETED
    assert second.steps == []
    assert (second.folder / "export" / "done.txt").exists()


def test_checkpoints_by_the_clock(supervisor):
    worker = supervisor.start(supervisor.job(checkpoint={"every_steps": 0, "every_seconds": 0.2}, **ENDLESS))
    worker.until(wire.Checkpoint)
    worker.until(wire.Checkpoint, lambda message: message.seq > worker.of(wire.Checkpoint)[0].seq)
    first, second = worker.of(wire.Checkpoint)[:2]
    assert second.step > first.step + 1
    worker.send(wire.Stop)
    worker.wait()


def test_memory_policy_keeps_the_cache_small(supervisor):
    quiet = {"policy": "always", "clear_after_update": False}
    kept = supervisor.run(supervisor.job(args={"hidden": 512}, memory=quiet))
    cleared = supervisor.run(supervisor.job(args={"hidden": 512}, memory=quiet | {"clear_after_update": True}))
    every = quiet | {"clear_before_gradients": True, "clear_after_gradients": True, "clear_after_update": True}
    all_points = supervisor.run(supervisor.job(args={"hidden": 512}, memory=every | {"release_pause_s": 0.01}))
    limited = supervisor.run(supervisor.job(args={"hidden": 512}, memory=quiet | {"cache_limit_bytes": 0}))
    assert kept.steps[-1].cache_bytes > 0
    for other in (cleared, all_points, limited):
        assert other.steps[-1].cache_bytes == 0
        assert other.bye.weights_sha256 == kept.bye.weights_sha256
    assert all_points.steps[-1].seconds >= 0.03


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA is enforced by Linux only")
def test_bare_leak_dies_under_a_data_limit(supervisor):
    """An unsupervised leaking run, without telemetry and lifeline, dies under a data limit."""
    job = supervisor.job(steps=2000, drill={"leak_mib_per_step": 16.0})
    worker = supervisor.start(job, bare=True, options=["--data-limit-mib", "600"])
    assert worker.process.wait(60) not in (wire.EXIT_COMPLETED, wire.EXIT_STOPPED, wire.EXIT_REFUSED)
    assert worker.messages == []
    assert worker.saved_steps == []


def test_bare_run_prints_its_speed(supervisor):
    worker = supervisor.start(supervisor.job(steps=3), bare=True)
    worker.sever()  # a bare run has no lifeline
    assert worker.process.wait(60) == wire.EXIT_COMPLETED
    assert worker.stdout.splitlines()[-1].startswith("completed: step=3 steps=3 seconds=")
    assert not supervisor.receive(0.2)


def test_output_without_a_reader_does_not_end_the_run(supervisor):
    """stdout and stderr are pipes without a reader."""
    job = supervisor.job(steps=3)
    (supervisor.folder / job.run).mkdir()
    file = supervisor.folder / job.run / "job.json"
    file.write_bytes(wire.dump_json(job))
    read_end, write_end = os.pipe()
    os.close(read_end)
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "mlx_worker", str(file), "--bare"], stdout=write_end, stderr=write_end
    )
    os.close(write_end)
    assert process.wait(60) == wire.EXIT_COMPLETED
