"""Any sequence of kills, stops, halvings and growths: the updates that count have the samples, and the losses, and at
one batch size the very bits, of an undisturbed run."""

import json
import random
import signal
from pathlib import Path

import pytest
from tests.training import jobs
from tests.training.mlx_lm.mlx_lm_runs import RecordingLink

from mlx_supervisor import wire

STEPS = 30
EFFECTIVE = 8
ARGS = {"norm": True, "dropout": 0.2, "lengths": 11, "evaluate_every": 7, "weighted": True}
"""48 samples grouped by length: an epoch is 6 updates."""
PAUSE = {"pause_s": 0.01}
EVERY = {"every_seconds": 0, "every_steps": 4}


def job(supervisor, name, args, generation=1, size=EFFECTIVE):
    batch = {"size": size, "effective": EFFECTIVE, "sample_log": True}
    return supervisor.job(name, args=args, batch=batch, checkpoint=EVERY, steps=STEPS, generation=generation)


def play(supervisor, name, args, rng, sizes):
    """Generation after generation until the run completes; `sizes`: what the batch may be at a start, or become."""
    workers, story = [], []
    for generation in range(1, 4):
        size = rng.choice(sizes)
        worker = supervisor.start(job(supervisor, name, args | PAUSE, generation, size))
        workers.append(worker)
        first = worker.until(wire.Ready).step
        end = first + rng.randint(0, 12)
        if end >= STEPS or len(workers) == 3:
            assert worker.wait() == wire.EXIT_COMPLETED, worker.stderr
            return workers, [*story, (size, "undisturbed")]
        resize = rng.choice(sizes)
        reach(worker, (first + end) // 2)
        worker.send(wire.Resize, batch_size=resize, effective_batch=EFFECTIVE)
        reach(worker, end)
        how = rng.choice(["kill", "stop", "sigterm", "lifeline"])
        story.append((size, resize, how, end))
        actions = {
            "kill": lambda worker=worker: worker.signal(signal.SIGKILL),
            "stop": lambda worker=worker: worker.send(wire.Stop, reason="a trip"),
            "sigterm": lambda worker=worker: worker.signal(signal.SIGTERM),
            "lifeline": worker.sever,
        }
        actions[how]()
        worker.wait()
    raise AssertionError(f"it never completed: {story}")


def reach(worker, step):
    worker.until((wire.Ready, wire.Step), lambda message: message.step >= step)


def losses(workers):
    return {message.step: message.loss for worker in workers for message in worker.steps}


def samples(worker):
    """The last report of every update."""
    return {line["step"]: line["samples"] for line in worker.samples}


@pytest.fixture(scope="module")
def seed():
    return random.randrange(2**32)


def test_at_one_batch_size_the_bits_are_the_same(supervisor, seed):
    calm = supervisor.run(job(supervisor, "calm", ARGS))
    assert calm.process.returncode == wire.EXIT_COMPLETED, calm.stderr
    for turn in range(2):
        workers, story = play(supervisor, f"wild{turn}", ARGS, random.Random(seed + turn), [EFFECTIVE])
        context = f"seed {seed}, turn {turn}: {story}"
        assert samples(workers[-1]) == samples(calm), context
        assert losses(workers) == losses([calm]), context
        assert workers[-1].bye.weights_sha256 == calm.bye.weights_sha256, context
    taken = [sample for ids in samples(calm).values() for sample in ids]
    assert all(sorted(taken[start : start + 48]) == list(range(48)) for start in range(0, len(taken) - 47, 48))


def test_across_batch_sizes_the_losses_agree(supervisor, seed):
    """Without dropout, which draws other numbers for other shapes, and running statistics, which see micro-batches."""
    args = ARGS | {"norm": False, "dropout": 0.0}
    calm = supervisor.run(job(supervisor, "calm", args))
    for turn in range(2):
        workers, story = play(supervisor, f"wild{turn}", args, random.Random(seed + turn), [1, 2, 3, 4, 8])
        context = f"seed {seed}, turn {turn}: {story}"
        assert samples(workers[-1]) == samples(calm), context
        found, expected = losses(workers), losses([calm])
        assert found == pytest.approx(expected, abs=1e-4), context
        assert [message.tokens for message in workers[-1].steps] == [
            message.tokens for message in calm.steps if message.step > workers[-1].ready.step
        ], context
    assert expected[STEPS] < expected[1] - 0.05, "nothing was learnt"


def in_process(folder, *, steps, generation=1, size=EFFECTIVE, **args):
    """A worker without its own process. May raise RefusedError."""
    from mlx_worker.supervision.stop import StopFlag
    from mlx_worker.training import loop

    link = RecordingLink()
    task = {"base_dir": str(Path(__file__).parents[1]), "entry": "toy_task:build", "args": args}
    fields = {"run_dir": str(folder), "seed": 7, "task": task, "batch": {"size": size, "sample_log": True}}
    loop.run(jobs.job(**fields, generation=generation, steps=steps), link, StopFlag())
    return link


def ids(folder):
    """The samples, in the order in which they were used."""
    return [i for line in (folder / "samples.jsonl").read_text().splitlines() for i in json.loads(line)["samples"]]


@pytest.mark.parametrize(
    ("before", "after", "reason"),
    [
        (
            {"frozen_layers": 0},
            {"frozen_layers": 1},
            r"layers\.0\.bias: float32\[16\] → absent; layers\.0\.weight",
        ),
        (
            {"frozen_layers": 1},
            {"frozen_layers": 0},
            r"layers\.0\.bias: absent → float32\[16\]; layers\.0\.weight",
        ),
        ({"lengths": 11}, {}, "Task.lengths is missing, but .* has it"),
        ({"lengths": 11}, {"lengths": 13}, "Task.lengths differs from that of"),
    ],
)
def test_a_run_that_would_not_continue_identically_is_refused(tmp_path, before, after, reason):
    from mlx_worker.errors import RefusedError

    in_process(tmp_path, steps=1, **before)
    with pytest.raises(RefusedError, match=reason):
        in_process(tmp_path, steps=2, generation=2, **after)
    assert in_process(tmp_path, steps=2, generation=2, **before).steps[0].step == 2


def test_a_run_that_began_with_a_plain_shuffle_keeps_it(tmp_path):
    """Checkpoints from before there was any grouping: the rest of the epoch must follow the same shuffle."""
    (tmp_path / "plain").mkdir()
    (tmp_path / "later").mkdir()
    in_process(tmp_path / "plain", steps=9)
    in_process(tmp_path / "later", steps=3)
    in_process(tmp_path / "later", steps=9, generation=2, lengths=11)
    assert ids(tmp_path / "later") == ids(tmp_path / "plain")


def test_a_run_keeps_the_grouping_it_began_with_at_another_batch_size(tmp_path):
    (tmp_path / "whole").mkdir()
    (tmp_path / "changed").mkdir()
    in_process(tmp_path / "whole", steps=12, lengths=11)
    in_process(tmp_path / "changed", steps=3, lengths=11)
    in_process(tmp_path / "changed", steps=21, generation=2, size=4, lengths=11)
    assert ids(tmp_path / "changed") == ids(tmp_path / "whole")
    assert sorted(ids(tmp_path / "whole")[:48]) == list(range(48))
    lengths = [1 + 7 * i % 11 for i in ids(tmp_path / "whole")]
    assert all(lengths[start : start + 8] == sorted(lengths[start : start + 8]) for start in range(0, 96, 8))
