"""The next update begins before the last is reported; reports, checkpoints and stops are the same as without."""

import mlx.core as mx
import mlx.optimizers as optim
import pytest
from tests.training import toy_task
from tests.training.jobs import memory_job

from mlx_supervisor import wire
from mlx_worker.memory import cache_policy
from mlx_worker.memory.cache_policy import CachePolicy
from mlx_worker.training import gradients
from mlx_worker.training.gradients import Gradients

GIB = 2**30
MEMORY = {"limit_bytes": 4 * GIB}


def reported(worker):
    """The report of every step, without times and memory."""
    return [(m.step, m.loss, m.learning_rate, m.tokens, m.samples, m.batch_size, m.accumulation) for m in worker.steps]


@pytest.mark.parametrize(
    ("batch", "compiled"), [({"size": 8}, True), ({"size": 3, "effective": 8}, False)], ids=["alone", "accumulated"]
)
def test_overlap_changes_nothing(supervisor, batch, compiled):
    args = {"weighted": True, "norm": True, "evaluate_every": 5}
    job = {"args": args, "batch": batch | {"sample_log": True}, "checkpoint": {"every_seconds": 0, "every_steps": 4}}
    overlapped = supervisor.run(supervisor.job(memory=MEMORY, **job), compiled=compiled)
    stepwise = supervisor.run(supervisor.job(memory=MEMORY | {"policy": "always"}, **job), compiled=compiled)
    assert overlapped.process.returncode == stepwise.process.returncode == wire.EXIT_COMPLETED, overlapped.stderr
    assert [m.step for m in overlapped.steps] == list(range(1, 13))
    assert reported(overlapped) == reported(stepwise)
    assert overlapped.bye.weights_sha256 == stepwise.bye.weights_sha256
    assert overlapped.samples == stepwise.samples
    assert overlapped.stdout.count("validation loss") == 4
    for worker in (overlapped, stepwise):
        assert [m.step for m in worker.of(wire.Checkpoint)] == [4, 8, 12]
        lines = [line for line in worker.stdout.splitlines() if line.startswith("validation")]
        assert lines == [line for line in stepwise.stdout.splitlines() if line.startswith("validation")]


def test_learning_rates_are_those_of_their_steps(supervisor):
    worker = supervisor.run(supervisor.job(memory=MEMORY))
    schedule = optim.cosine_decay(1e-2, 200)
    expected = [schedule(mx.array(step)).item() for step in range(12)]
    assert [m.learning_rate for m in worker.steps] == pytest.approx(expected, rel=1e-5)


def test_every_report_has_the_peak_of_its_update(supervisor):
    """Also of the one that had begun before the counter was set back.

    How high a peak is depends on how soon the device's thread frees what it used, so two runs don't compare; what an
    update holds at its end does not depend on that, and its peak is well above.
    """
    overlapped = supervisor.run(supervisor.job(args={"hidden": 512}, memory=MEMORY))
    stepwise = supervisor.run(supervisor.job(args={"hidden": 512}, memory=MEMORY | {"policy": "always"}))
    at_rest = min(m.active_bytes for m in stepwise.steps)
    assert min(m.peak_bytes for m in stepwise.steps) > 1.2 * at_rest
    assert min(m.peak_bytes for m in overlapped.steps) > 1.2 * at_rest


@pytest.mark.parametrize("changes", [{}, {"policy": "never"}, {"limit_bytes": None}], ids=str)
def test_at_every_review_the_counters_are_read_with_nothing_in_flight(supervisor, changes):
    """What grows from update to update is found in these; the others hold a part of the next update's."""
    args = {"hidden": 512, "pause_s": 0.01}
    overlapped = supervisor.run(supervisor.job(steps=48, args=args, memory=MEMORY | changes))
    stepwise = supervisor.run(supervisor.job(steps=48, args=args, memory=MEMORY | {"policy": "always"}))
    floor = min(m.active_bytes for m in stepwise.steps)
    clean = [m.active_bytes for m in overlapped.steps if m.step % 16 == 0]
    assert clean == pytest.approx([floor] * 3, abs=100), "except for a few numbers of the previous update"


def test_a_relief_keeps_the_cache_small_for_a_while(supervisor):
    worker = supervisor.start(supervisor.job(steps=5000, args={"hidden": 512, "pause_s": 0.005}, memory=MEMORY))
    before = worker.until(wire.Step, lambda message: message.step == 20)
    worker.send(wire.ClearCache)
    cleared = worker.until(wire.Cleared)
    assert before.cache_bytes > 0
    assert cleared.cache_bytes < before.cache_bytes
    worker.send(wire.Stop)
    assert worker.wait() == wire.EXIT_STOPPED


def test_adaptive_bounds_the_cache_by_the_limit(monkeypatch):
    limits = []
    monkeypatch.setattr(cache_policy.mx, "set_cache_limit", limits.append)
    memory = CachePolicy(memory_job(limit_bytes=GIB))
    array = mx.zeros((1024, 1024))
    mx.eval(array)
    counters = memory.note_update()
    assert len(limits) == 1
    assert 0 < limits[0] <= 3 * counters.peak_bytes
    assert counters.peak_bytes >= array.nbytes
    memory.relieve()
    assert limits[1] == limits[0] // 2
    own = CachePolicy(memory_job(limit_bytes=GIB, cache_limit_bytes=5))
    own.note_update()
    assert limits[2:] == [5, 5], "the user's own limit is the most"


@pytest.mark.parametrize("policy", ["always", "never"])
def test_other_policies_leave_the_limits_alone(monkeypatch, policy):
    limits = []
    monkeypatch.setattr(cache_policy.mx, "set_cache_limit", limits.append)
    memory = CachePolicy(memory_job(limit_bytes=GIB, policy=policy))
    memory.note_update()
    memory.relieve()
    assert limits == []
    assert memory.waits is (policy == "always")


def test_too_little_room_clears_the_cache_and_ends_the_overlap(monkeypatch):
    monkeypatch.setattr(cache_policy.mx, "set_cache_limit", lambda limit: None)
    cleared = []
    monkeypatch.setattr(cache_policy.mx, "clear_cache", lambda: cleared.append(True))
    monkeypatch.setattr(cache_policy.mx, "get_cache_memory", lambda: 1000)
    memory = CachePolicy(memory_job(limit_bytes=2**20))  # this process alone is larger
    assert not memory.waits
    array = mx.zeros((1024,))
    mx.eval(array)
    memory.note_update()
    del array
    assert cleared
    assert memory.waits


@pytest.mark.parametrize(("policy", "clears"), [("adaptive", True), ("never", False)])
def test_an_evaluation_that_needs_more_than_training_gets_the_caches_room(monkeypatch, policy, clears):
    """After every batch, not at the end: an evaluation may take minutes, and exceeding the limit kills at once."""
    cleared = []
    monkeypatch.setattr(cache_policy.mx, "set_cache_limit", lambda limit: None)
    monkeypatch.setattr(cache_policy.mx, "clear_cache", lambda: cleared.append(True))
    memory = CachePolicy(memory_job(limit_bytes=1000, policy=policy))
    monkeypatch.setattr(memory, "read", lambda: cache_policy.Counters(500, 400, 600, 930))
    memory.note_evaluated()
    assert cleared == []
    monkeypatch.setattr(memory, "read", lambda: cache_policy.Counters(500, 400, 600, 950))
    memory.note_evaluated()
    assert bool(cleared) is clears


def test_memory_is_checked_after_every_batch_of_an_evaluation(supervisor):
    cached = []
    for limit_bytes in (2**20, 4 * GIB):  # a process alone is larger than the first
        worker = supervisor.run(
            supervisor.job(entry="odd_tasks:evaluating", steps=5, memory={"limit_bytes": limit_bytes})
        )
        assert worker.process.returncode == wire.EXIT_COMPLETED, worker.stderr
        lines = [line.split() for line in worker.stdout.splitlines()]
        cached.append([int(words[1]) for words in lines if words[0] == "cached"])
    assert cached[0] == [0] * 6, "before the first update and after the last"
    assert min(cached[1]) > 0


def test_a_program_for_each_shape_and_a_fresh_start_after_too_many(monkeypatch):
    monkeypatch.setattr(gradients, "SHAPES_LIMIT", 3)
    task = toy_task.build(seed=1, dropout=0.0)
    task.optimizer.init(task.model.trainable_parameters())
    traced = []
    plain = task.loss
    task.loss = lambda model, x, y, w: (traced.append(x.shape), plain(model, x, y, w))[1]
    computed = Gradients(task)

    def step(size):
        computed.add(task.collate(list(range(size))), size, alone=True)
        return computed.apply().wait()

    for _ in range(3):
        for size in (4, 5, 6):
            step(size)
    assert len(traced) == 3
    step(7)
    step(4)
    assert len(traced) == 5, "the programs of the first three shapes were dropped"
