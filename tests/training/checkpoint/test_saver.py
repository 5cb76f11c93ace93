"""Checkpoints in the background: each holds the state of its step, and every failure is reported."""

import copy
import errno
import gc
import shutil
import signal
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from tests.training import toy_task
from tests.training.checkpoint.saver_bench import PATIENCE_S, TASK, Bench
from tests.training.jobs import memory_job

from mlx_worker.checkpoint import background_writer, saver, snapshot, training_state
from mlx_worker.checkpoint.background_writer import BackgroundWriter
from mlx_worker.checkpoint.interval import FIRST_S, LONGEST_S, SHORTEST_S
from mlx_worker.checkpoint.rng_state import seed_generators
from mlx_worker.checkpoint.store import weights_sha256
from mlx_worker.memory.cache_policy import CachePolicy, Counters
from mlx_worker.training.gradients import Gradients


class Training:
    """The updates of a toy run, one by one, as the loop makes them."""

    def __init__(self, *, compiled: bool, **build: Any) -> None:
        seed_generators(3)
        self.task = toy_task.build(3, **build)
        self.task.compile = compiled
        self.task.optimizer.init(self.task.model.trainable_parameters())
        self.gradients = Gradients(self.task)
        self.task.model.train()
        self.step = 0

    def update(self) -> None:
        ids = [(8 * self.step + i) % 48 for i in range(8)]
        self.gradients.add(self.task.collate(ids), 8, alone=True)
        self.gradients.apply()
        self.step += 1

    def digest(self) -> str:
        return weights_sha256(training_state.trained_arrays(self.task) | training_state.optimizer_arrays(self.task))


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("build", [{"norm": True}, {"optimizer": "SGD"}])
def test_a_slow_write_has_the_state_of_its_step(tmp_path: Path, compiled: bool, build: dict[str, Any]) -> None:
    calm = Training(compiled=compiled, **build)
    states = []
    for _ in range(12):
        calm.update()
        states.append((calm.digest(), training_state.trainer_state(training_state.Progress(), 0, {}, calm.task)["rng"]))
    bench, run = Bench(tmp_path), Training(compiled=compiled, **build)
    for _ in range(4):
        run.update()
    bench.files.gate.clear()
    bench.save(4, task=run.task)
    for _ in range(8):
        run.update()
        bench.saver.note_update(0.001)
    assert bench.reports == [], "the write is still running"
    bench.files.gate.set()
    bench.saver.settle()
    found = bench.store.load_newest()
    assert found is not None
    assert weights_sha256(found.trained | found.optimizer) == states[3][0]
    assert found.trainer["rng"] == states[3][1]
    assert (found.trainer["progress"]["step"], found.trainer["progress"]["cursor"]) == (4, 32)
    assert run.digest() == states[11][0], "training is not disturbed by the write"


def test_later_assignments_in_place_do_not_change_a_snapshot() -> None:
    model = nn.Linear(4, 4)
    task = toy_task.build(0)
    task.model = model
    facts = {"free": {"batch.size": 8}}
    progress = training_state.Progress(step=1)
    before = mx.array(model.weight) + 0
    mx.eval(before)
    taken = snapshot.take(progress, 0, facts, task)
    model.weight[0] = 7.0
    facts["free"] |= {"batch.size": 4}
    progress.step = 2
    mx.random.uniform()
    mx.eval(model.state)
    assert mx.array_equal(taken.trained["weight"], before)
    assert taken.trainer["recipe"]["free"] == {"batch.size": 8}
    assert (taken.step, taken.trainer["progress"]["step"]) == (1, 1)


def test_a_snapshot_copies_nothing_where_memory_is_one() -> None:
    if not snapshot.shared_memory():
        pytest.skip("CUDA's memory is its own")
    task = toy_task.build(0, hidden=4096, optimizer="SGD", schedule=False)
    mx.eval(task.model.state)
    before_bytes = mx.get_active_memory()
    taken = snapshot.take(training_state.Progress(), 0, {}, task)
    assert mx.get_active_memory() - before_bytes < 4096
    assert sum(array.nbytes for array in taken.trained.values()) > 100_000


@pytest.mark.parametrize(("room", "waiting", "copies"), [(True, False, 1), (False, False, 0), (True, True, 0)])
def test_with_cudas_memory_only_a_snapshot_for_the_background_is_a_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: bool, waiting: bool, copies: int
) -> None:
    """If training pauses for the write, there may be no room for a copy: it would end the run."""
    monkeypatch.setattr(snapshot, "shared_memory", lambda: False)
    bench = Bench(tmp_path)
    bench.memory.has_room = lambda more_bytes: room
    task = toy_task.build(0, hidden=4096, optimizer="SGD", schedule=False)
    task.optimizer.init(task.model.trainable_parameters())
    mx.eval(task.model.state, task.optimizer.state)
    held_bytes: list[int] = []
    bench.files.on_write = lambda: held_bytes.append(mx.get_active_memory())
    gc.collect()  # garbage of earlier tests
    mx.clear_cache()  # a reused buffer may be larger than the array in it
    before_bytes = mx.get_active_memory()
    bench.save(1, task=task, waiting=waiting)
    bench.saver.settle()
    assert [report.ok for report in bench.reports] == [True]
    assert held_bytes[0] - before_bytes == pytest.approx(copies * snapshot.size_bytes(task), abs=4096)


def test_half_precision_and_transposed_arrays_load(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    task = toy_task.build(0)
    task.model = nn.Linear(3, 5)
    task.model.weight = mx.arange(15, dtype=mx.bfloat16).reshape(3, 5).T
    bench.save(1, task=task)
    bench.saver.settle()
    found = bench.store.load_newest()
    assert found is not None
    assert weights_sha256(found.trained) == weights_sha256(training_state.trained_arrays(task))


def test_a_failing_disk_is_reported_by_the_training_thread_and_training_continues(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.files.error = errno.ENOSPC
    assert bench.save(1)
    bench.until_reported(1)
    assert not bench.reports[0].ok
    assert "ENOSPC" in bench.reports[0].error
    assert not bench.save(1), "not tried twice at the same step"
    bench.files.error = 0
    assert bench.save(2)
    bench.until_reported(2)
    assert bench.reports[1].ok
    assert bench.steps == [2]
    assert bench.threads == {threading.get_ident()}


def test_a_retry_writes_the_state_of_the_failed_save_and_reports_only_its_success(tmp_path: Path) -> None:
    bench, run = Bench(tmp_path), Training(compiled=False)
    run.update()
    saved = run.digest()
    bench.files.error = errno.ENOSPC
    assert not bench.save(1, task=run.task, waiting=True)
    assert bench.saver.can_retry
    run.update()  # as an export that changes the model
    assert not bench.saver.retry()
    bench.files.error = 0
    assert bench.saver.retry()
    assert [(report.step, report.ok) for report in bench.reports] == [(1, False), (1, True)]
    found = bench.store.load_newest()
    assert found is not None
    assert weights_sha256(found.trained | found.optimizer) == saved


def test_a_checkpoint_that_was_deleted_is_saved_again(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.save(1, waiting=True)
    shutil.rmtree(bench.store.folder)
    assert bench.save(1, waiting=True)
    assert bench.steps == [1]
    (note,) = bench.reports[1].notes
    assert note.endswith("c was deleted during the run, with its checkpoints; made it again")


def test_an_error_not_caused_by_the_disk_ends_the_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(tmp_path)

    def broken(*_: Any) -> None:
        raise RuntimeError("the device failed")

    monkeypatch.setattr(bench.store, "save", broken)
    for waiting in (False, True):
        with pytest.raises(RuntimeError, match="the device failed"):  # noqa: PT012
            bench.save(1 + waiting, waiting=waiting)
            bench.saver.settle()
    assert [(report.ok, report.error) for report in bench.reports] == [(False, "the device failed")] * 2


def test_a_time_interval_waits_for_the_writer_a_step_interval_blocks(tmp_path: Path) -> None:
    clock, steps = Bench(tmp_path / "a", every_seconds=1e-9), Bench(tmp_path / "b", every_steps=2)
    for bench in (clock, steps):
        bench.files.gate.clear()
        assert bench.saver.is_due(2)
        bench.save(2)
        assert not bench.saver.is_due(3)
    assert not clock.saver.is_due(4)
    assert steps.saver.is_due(4)
    for bench in (clock, steps):
        assert bench.files.reached.wait(PATIENCE_S)
        threading.Timer(0.1, bench.files.gate.set).start()
        bench.save(4)
        assert [report.step for report in bench.reports] == [2], "waited for, and reported"
        assert bench.reports[0].stall_s > 0.05
        bench.until_reported(2)
        assert bench.steps == [2, 4]
        assert 0 < bench.reports[1].stall_s <= bench.reports[1].seconds


def test_a_waiting_save_is_durable_and_follows_a_running_write(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.files.gate.clear()
    bench.save(1)
    threading.Timer(0.05, bench.files.gate.set).start()
    assert bench.save(2, waiting=True)
    assert [(report.step, report.ok) for report in bench.reports] == [(1, True), (2, True)]
    assert bench.steps == [1, 2]
    assert bench.reports[1].stall_s >= bench.reports[1].seconds > 0
    assert bench.save(2, waiting=True), "saved already"
    assert len(bench.reports) == 2


def test_without_an_interval_the_costs_decide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = [100.0]
    clock = SimpleNamespace(monotonic=lambda: now_s[0], perf_counter=lambda: now_s[0])
    for module in (saver, background_writer):  # a checkpoint then costs nothing
        monkeypatch.setattr(module, "time", clock)
    bench = Bench(tmp_path, overhead=0.01, mean_time_between_failures_s=60.0)

    def due_after(seconds: float) -> bool:
        now_s[0] += seconds
        return bench.saver.is_due(1)

    assert not due_after(FIRST_S - 1)
    assert due_after(1)
    for step in (1, 2, 3):
        bench.save(step)
        bench.until_reported(step)
        assert not due_after(SHORTEST_S - 0.5), "free checkpoints are taken at the minimum interval"
        assert due_after(FIRST_S - SHORTEST_S), "the measured cost counts"
    bench.files.gate.clear()
    bench.save(4)
    assert not due_after(LONGEST_S), "the writer is busy"
    bench.files.gate.set()


def test_a_write_costs_at_most_its_own_duration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that slept, or updates that became faster, must neither prevent nor trigger a checkpoint."""
    now_s = [100.0]
    clock = SimpleNamespace(monotonic=lambda: now_s[0], perf_counter=lambda: now_s[0])
    for module in (saver, background_writer):
        monkeypatch.setattr(module, "time", clock)
    bench = Bench(tmp_path, overhead=0.01, mean_time_between_failures_s=1.0)
    for _ in range(10):
        bench.saver.note_update(1.0)

    def due_after_write(step: int, updates_s: list[float]) -> float:
        """Seconds from a write of 2 s, with these updates beside it, to the next."""
        began_s = now_s[0]
        bench.files.gate.clear()
        bench.save(step)
        now_s[0] += 2.0
        for seconds in updates_s:
            bench.saver.note_update(seconds)
        bench.files.gate.set()
        bench.saver.settle()
        while not bench.saver.is_due(step):
            now_s[0] += 1.0
        return now_s[0] - began_s

    assert due_after_write(1, [500.0]) == pytest.approx(200, abs=2), "1 % overhead: 2 s every 200 s"
    assert due_after_write(2, [0.0] * 50) < 50, "a negative cost averages out, and the formula decides"
    assert due_after_write(3, [500.0]) == pytest.approx(200 / 3, abs=2), "an unbounded gain would have hidden this cost"


def test_training_pauses_where_memory_is_short(tmp_path: Path) -> None:
    for in_background in (True, False):
        bench = Bench(tmp_path / str(in_background))
        requested: list[int] = []
        bench.memory.has_room = lambda more, log=requested, room=in_background: log.append(more) or room
        threads = set[int]()
        bench.files.on_write = lambda threads=threads: threads.add(threading.get_ident())
        bench.save(1)
        bench.saver.settle()
        assert [report.ok for report in bench.reports] == [True]
        assert requested == [snapshot.size_bytes(TASK)]
        assert (threads == {threading.get_ident()}) is not in_background


def test_room_is_the_limit_minus_the_peak_of_an_update(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = CachePolicy(memory_job(policy="never", limit_bytes=1000))
    monkeypatch.setattr(memory, "device", SimpleNamespace(own_bytes=None, wired_bytes=None, enforces=False))
    # 300 active, 200 cached, 450 at the height, 700 resident: 200 are of others; 650 at the height without the cache
    monkeypatch.setattr(memory, "read", lambda: Counters(300, 200, 450, 700))
    assert memory.has_room(250)
    assert not memory.has_room(251)
    monkeypatch.setattr(memory, "device", SimpleNamespace(own_bytes=2000, wired_bytes=None, enforces=True))
    memory.device_limit_bytes = 1600
    assert memory.has_room(990), "the device's limit counts, whatever the process holds elsewhere"
    assert not memory.has_room(991)
    unlimited = CachePolicy(memory_job(policy="never"))
    assert unlimited.has_room(2**60)


def test_the_best_stays_however_old_it_gets(tmp_path: Path) -> None:
    bench = Bench(tmp_path, keep_best=True, keep=2)

    def evaluated(step: int, loss: float) -> None:
        bench.saver.note_evaluation(step, loss)
        if bench.saver.is_due(step):
            bench.save(step)

    for step, loss in ((0, 0.1), (5, float("nan")), (6, float("-inf"))):  # nothing trained or measured yet
        bench.saver.note_evaluation(step, loss)
        assert not bench.saver.is_due(step + 1)
    evaluated(10, 3.0)
    evaluated(20, 1.0)
    evaluated(30, float("nan"))
    for step in (40, 50, 60):
        evaluated(step, 2.0)
        bench.save(step, waiting=True)
    assert bench.steps == [20, 50, 60]
    bench.saver = bench.begin()  # the next generation knows it
    evaluated(70, 1.5)
    bench.save(80, waiting=True)
    assert bench.steps == [20, 60, 80]
    bench.files.error = errno.EIO
    evaluated(90, 0.5)
    bench.saver.settle()
    bench.files.error = 0
    bench.save(100, waiting=True)
    assert bench.steps == [20, 80, 100], "a failed write of a better state must not delete the last best checkpoint"
    evaluated(110, 0.9)
    bench.saver.settle()
    assert bench.steps == [100, 110]
    found = bench.store.load_newest()
    assert found is not None
    assert found.trainer["best"] == {"step": 110, "loss": 0.9}


@pytest.mark.parametrize("noted", [None, 7, {}, {"step": "9", "loss": 1.0}, {"step": 9, "loss": 1.0}])
def test_a_deleted_best_is_forgotten(tmp_path: Path, noted: Any) -> None:
    bench = Bench(tmp_path, keep_best=True)
    bench.store.save(1, {"w": mx.ones((2,))}, {}, {"best": copy.deepcopy(noted)})
    assert bench.begin().best is None


def test_without_keep_best_no_best_is_kept(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.saver.note_evaluation(1, 0.5)
    assert not bench.saver.is_due(1)
    bench.save(1, waiting=True)
    found = bench.store.load_newest()
    assert found is not None
    assert "best" not in found.trainer


def test_signals_are_left_to_the_main_thread() -> None:
    masks: list[set[int]] = []

    def write() -> Any:
        masks.append(set(signal.pthread_sigmask(signal.SIG_BLOCK, [])))

    writer = BackgroundWriter()
    writer.start(write)
    writer.collect(waiting=True)
    assert masks[0] >= {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1}
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_a_measured_failure_rate_is_not_a_change_of_settings(tmp_path: Path) -> None:
    def recorded(between_s: float) -> Any:
        job = Bench(tmp_path, mean_time_between_failures_s=between_s, keep_best=True).job
        return training_state.recipe(job, TASK, 1, 8, 8)["free"]["checkpoint"]

    assert recorded(60.0) == recorded(900.0)
    assert recorded(60.0)["keep_best"] is True


def test_a_tighter_interval_holds_at_the_start_of_a_generation_only(tmp_path: Path) -> None:
    bench = Bench(tmp_path, every_seconds=0.0, tighter_steps=2)
    assert [step for step in range(1, 30) if bench.saver.is_due(step)] == list(range(2, 17))
    bench.save(2, waiting=True)
    assert not bench.saver.is_due(3)
    assert bench.saver.is_due(4)


def test_a_write_that_never_ends_stops_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(tmp_path, every_steps=2)
    bench.files.gate.clear()
    bench.save(2)
    bench.saver.note_update(0.1)
    assert bench.reports == []
    monkeypatch.setattr("mlx_worker.checkpoint.saver.CHECKPOINT_BOUND_S", 0.0)
    threading.Timer(0.1, bench.files.gate.set).start()
    bench.saver.note_update(0.1)  # waits, as the watchdog and the supervisor can see
    assert [report.step for report in bench.reports] == [2]
