"""A run that is killed a hundred times ends like an undisturbed one."""

import random
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.process import harness
from tests.training.test_supervised import SAMPLES, TASK, used_samples, worker_of

KILLS = 100
STEPS = 2000
DEADLINE_S = 600.0
PAUSE_S = 0.01
"""Sleep in every update: a generation makes about 20 updates, and 100 generations don't complete the run."""


def settings_in(folder: Path, *, pause_s: float, **tables: Any) -> Path:
    """With all state that must be restored: dropout, running statistics, a schedule, the order of grouped samples, and
    evaluations that draw random numbers."""
    folder.mkdir()
    (folder / "toy_task.py").write_text(TASK.read_text())
    args = {"samples": SAMPLES, "pause_s": pause_s, "norm": True, "lengths": 11, "evaluate_every": 90, "rate": 1e-3}
    tables = {"batch": {"size": 8, "sample_log": True}, "checkpoint": {"every_steps": 10}} | tables
    return harness.write_settings(folder, args=args, steps=STEPS, entry="toy_task:build", **tables)


@pytest.mark.long
def test_a_hundred_kills_leave_the_weights_and_the_samples_as_they_were(tmp_path: Path) -> None:
    undisturbed = harness.run(settings_in(tmp_path / "calm", pause_s=0.0), trains=True).summary()
    assert undisturbed["step"] == STEPS
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    restart = {"max_without_progress": 1000, "backoff_max_s": 0.01}
    settings = settings_in(tmp_path / "wild", pause_s=PAUSE_S, restart=restart)
    started_s = time.monotonic()
    with harness.Foreground(settings, trains=True) as foreground:
        kills = kill_at_random(foreground, random.Random(seed), started_s + DEADLINE_S)
        assert foreground.process.wait(DEADLINE_S) == 0, foreground.stderr[-2000:]
    seconds = time.monotonic() - started_s
    summary = foreground.summary()
    generations = summary["generations"]
    causes = [generation["cause"] for generation in generations]
    training = sum(generation["last_step"] is not None for generation in generations)
    print(
        f"{kills} kills, {training} of {len(generations)} generations made updates, "
        f"{summary['replayed_steps']} of {STEPS} updates made again, {seconds:.0f} s, goodput {summary['goodput']}"
    )
    assert causes == ["killed externally"] * KILLS + ["completed"], f"seed {seed}"
    assert summary["replayed_steps"] > 0
    assert summary["step"] == STEPS
    assert summary["weights_sha256"] == undisturbed["weights_sha256"], f"seed {seed}"
    losses = [harness.journaled_losses(tmp_path / name) for name in ("calm", "wild")]
    assert losses[0] == losses[1], f"seed {seed}"
    used = used_samples(tmp_path / "wild")
    assert used == used_samples(tmp_path / "calm"), f"seed {seed}"
    taken = STEPS * 8
    assert set(used) == set(range(SAMPLES))
    assert set(used.values()) <= {taken // SAMPLES, -(-taken // SAMPLES)}, f"seed {seed}"


def kill_at_random(foreground: harness.Foreground, rng: random.Random, deadline_s: float) -> int:
    """Kill every worker: most while they train, some while they still load. The number of kills."""
    killed: set[int] = set()
    ready = 0
    while len(killed) < KILLS:
        assert time.monotonic() < deadline_s, f"only {len(killed)} kills: {foreground.stderr[-2000:]}"
        assert foreground.process.poll() is None, foreground.stderr[-2000:]
        worker = worker_of(foreground)
        if worker is None or worker.pid in killed:
            time.sleep(0.005)
            continue
        if rng.random() < 0.9:
            while foreground.stderr.count("Ready at step") == ready and worker.is_running():
                assert time.monotonic() < deadline_s
                time.sleep(0.005)
            time.sleep(rng.uniform(0.0, 0.6))
        else:
            time.sleep(rng.uniform(0.0, 0.4))
        try:
            worker.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
        killed.add(worker.pid)
        ready = foreground.stderr.count("Ready at step")
    return len(killed)
