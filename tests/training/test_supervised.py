"""End to end with real MLX: a disturbed run ends with the same result as an undisturbed one."""

import json
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
from tests.process import harness

SAMPLES = 48
KILLS = 5
TASK = Path(__file__).with_name("toy_task.py")


def settings_in(folder: Path, *, steps: int, pause_s: float, **tables: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "toy_task.py").write_text(TASK.read_text())
    args = {"samples": SAMPLES, "pause_s": pause_s, "dropout": tables.pop("dropout", 0.2), "rate": 1e-3}
    tables = {"batch": {"size": 8}, "checkpoint": {"every_steps": 10}} | tables
    return harness.write_settings(folder, args=args, steps=steps, entry="toy_task:build", **tables)


def worker_of(foreground: harness.Foreground) -> psutil.Process | None:
    children = psutil.Process(foreground.process.pid).children()
    return children[0] if children else None


def test_killed_five_times_it_ends_with_the_same_weights(tmp_path: Path) -> None:
    undisturbed = harness.run(settings_in(tmp_path / "calm", steps=300, pause_s=0.0), trains=True).summary()
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    settings = settings_in(tmp_path / "wild", steps=300, pause_s=0.02)
    with harness.Foreground(settings, trains=True) as foreground:
        for kill in range(1, KILLS + 1):
            harness.eventually(lambda kill=kill: foreground.stderr.count("Ready at step") == kill)  # type: ignore[misc]
            time.sleep(rng.uniform(0.3, 0.9))  # at a random step
            worker = worker_of(foreground)
            assert worker is not None
            worker.send_signal(signal.SIGKILL)
        assert foreground.wait() == 0, foreground.stderr
    summary = foreground.summary()
    causes = [generation["cause"] for generation in summary["generations"]]
    assert causes == ["killed externally"] * KILLS + ["completed"], f"seed {seed}"
    assert {generation["batch_size"] for generation in summary["generations"]} == {8}
    assert summary["replayed_steps"] > 0
    assert summary["weights_sha256"] == undisturbed["weights_sha256"], f"seed {seed}"


def test_trips_with_preserve_effective_leave_the_losses_and_the_samples_as_they_were(tmp_path: Path) -> None:
    steps = 120
    calm = settings_in(tmp_path / "calm", steps=steps, pause_s=0.0, dropout=0.0)
    assert harness.run(calm, trains=True).process.returncode == 0
    wild = settings_in(
        tmp_path / "wild",
        steps=steps,
        pause_s=0.01,
        dropout=0.0,
        batch={"size": 8, "sample_log": True},
        memory={"limit": "1000 MiB", "soft_share": 0.9},
        drill={"leak_mib_per_step": 30, "leak_kind": "native"},
    )
    done = harness.run(wild, trains=True)
    summary = done.summary()
    assert summary["outcome"] == "completed", done.stderr
    assert summary["trips"] >= 2
    sizes = [generation["batch_size"] for generation in summary["generations"]]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[:2] == [8, 4]
    assert summary["replayed_steps"] == 0
    expected, found = harness.journaled_losses(tmp_path / "calm"), harness.journaled_losses(tmp_path / "wild")
    assert list(found) == list(expected) == list(range(1, steps + 1))
    worst = max(abs(found[step] - expected[step]) / abs(expected[step]) for step in found)
    assert worst < 1e-4, f"the worst loss is off by {worst:.2e}"
    used = used_samples(tmp_path / "wild")
    epochs = steps * 8 // SAMPLES
    assert used == Counter(dict.fromkeys(range(SAMPLES), epochs))


def used_samples(folder: Path) -> Counter[int]:
    """How often each sample was used; of an update made twice, the later counts."""
    lines = (folder / "state/runs/run/samples.jsonl").read_text().splitlines()
    updates = {record["step"]: record["samples"] for record in map(json.loads, lines)}
    return Counter(sample for samples in updates.values() for sample in samples)


def test_supervisor_killed_the_next_one_ends_with_the_same_weights(tmp_path: Path) -> None:
    undisturbed = harness.run(settings_in(tmp_path / "calm", steps=120, pause_s=0.0), trains=True).summary()
    settings = settings_in(tmp_path / "wild", steps=120, pause_s=0.02, checkpoint={"every_seconds": 3600})
    with harness.Foreground(settings, trains=True) as foreground:
        foreground.until("Ready")
        harness.eventually(lambda: harness.journaled_steps(tmp_path / "wild") > 0)
        tokens = harness.tokens_of(foreground.process.pid)
        killed_s = time.monotonic()
        os.kill(foreground.process.pid, signal.SIGKILL)
        foreground.process.wait()
        harness.eventually(lambda: harness.carriers(tokens) == [])
        assert time.monotonic() - killed_s < 20
    done = harness.run(settings, trains=True)
    summary = done.summary()
    assert summary["outcome"] == "completed"
    assert summary["replayed_steps"] == 0
    assert summary["weights_sha256"] == undisturbed["weights_sha256"]


def test_growth_from_a_small_start_keeps_the_losses(tmp_path: Path) -> None:
    steps = 60
    assert harness.run(settings_in(tmp_path / "calm", steps=steps, pause_s=0.0, dropout=0.0), trains=True).summary()
    batch = {"size": 8, "start": 1, "grow_after_steps": 10}
    growing = settings_in(
        tmp_path / "growing", steps=steps, pause_s=0.02, dropout=0.0, batch=batch, restart={"close_after_steps": 5}
    )
    done = harness.run(growing, trains=True)
    assert done.process.returncode == 0, done.stderr
    assert "Growing micro-batch to 2 " in done.stderr
    assert "Growing micro-batch to 8 " in done.stderr
    assert done.summary()["generations"][-1]["batch_size"] == 8
    expected, found = harness.journaled_losses(tmp_path / "calm"), harness.journaled_losses(tmp_path / "growing")
    assert max(abs(found[step] - expected[step]) / abs(expected[step]) for step in expected) < 1e-4


def test_on_a_full_disk_the_end_waits_for_room_and_the_person_is_told_once(tmp_path: Path) -> None:
    folder, flag = tmp_path / "full", tmp_path / "flag"
    folder.mkdir()
    (folder / "slow_disk.py").write_text(TASK.with_name("slow_disk.py").read_text())
    (folder / "toy_task.py").write_text(TASK.read_text())
    settings = harness.write_settings(
        folder, args={"flag": str(flag), "from_step": 4}, steps=6, entry="slow_disk:full",
        batch={"size": 8}, checkpoint={"every_steps": 2},
    )  # fmt: skip
    with harness.Foreground(settings, trains=True) as foreground:
        harness.eventually(lambda: "Waiting for the disk of" in foreground.stderr, lambda: foreground.stderr)
        assert (folder / "state" / "runs" / "run" / "export" / "done.txt").exists()
        flag.unlink()
        assert foreground.wait() == 0, foreground.stderr
    summary = foreground.summary()
    assert (summary["outcome"], summary["step"], summary["replayed_steps"]) == ("completed", 6, 0)
    assert len(summary["generations"]) == 1
    assert foreground.stderr.count("Waiting for the disk of") == foreground.stderr.count("The wait is over.") == 1
