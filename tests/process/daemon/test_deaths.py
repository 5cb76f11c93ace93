"""Every cause of a death, under the real supervisor: named, reported, and met with the right batch.

Real: the kernel's out-of-memory killer, MemoryError, a full disk, a fatal signal, errors of the user's code, a dead
supervisor, a ramp over the limit. Recorded, with the same exit: Metal, CUDA. Simulated: a machine's restart.
"""

import json
import os
import sqlite3
import tomllib
import warnings
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from tests.process import harness
from tests.process.host.cage import NoCageError, cage, worker_in

from mlx_supervisor.process.launch import WORKER_VARIABLE

DIAGNOSIS = Path(__file__).parents[2] / "core" / "diagnosis"
EXITS = tomllib.loads((DIAGNOSIS / "stderr" / "index.toml").read_text())
RAISED = tomllib.loads((DIAGNOSIS / "raised.toml").read_text())
HALVED, KEPT = [8, 4], [8, 8]


def die(folder: Path, mode: str, *, trains: bool = False, **more: Any) -> harness.Foreground:
    """A generation that dies at step 12, after a checkpoint of step 10; the next one completes."""
    args: dict[str, Any] = {"mode": mode, "at_step": 12, "generations": 1} | more
    memory = args.pop("memory", {})
    restart = {"jitter": 0} | args.pop("restart", {})
    settings = harness.write_settings(folder, args=args, batch={"size": 8}, memory=memory, restart=restart)
    return harness.run(settings, trains=trains)


def records(folder: Path) -> list[dict[str, Any]]:
    """Every generation as the journal has it."""
    with closing(sqlite3.connect(f"file:{folder / 'state/journal.db'}?mode=ro", uri=True)) as connection:
        rows = connection.execute("SELECT record FROM generations ORDER BY generation").fetchall()
    return [json.loads(row[0]) for row in rows]


def check(folder: Path, done: harness.Foreground, cause: str, batches: list[int], *words: str) -> None:
    """Summary, journal and output report the same; only steps since the checkpoint are repeated."""
    summary = done.summary()
    assert summary["outcome"] == "completed", summary["reason"]
    generations = summary["generations"]
    assert [each["cause"] for each in generations] == [cause, "completed"]
    assert [each["batch_size"] for each in generations] == batches
    assert generations[1]["first_step"] == 11, "from the newest checkpoint"
    assert [record["cause"] for record in records(folder)] == [cause, "completed"]
    for word in words:
        assert word in generations[0]["error"]
        assert word in done.stderr + (folder / "state/supervisor.log").read_text(), "long errors are cut on the screen"
    assert cause in done.stderr
    assert summary["trips"] == (1 if batches == HALVED else 0)


# ---- the kernel's out-of-memory killer


def test_killed_by_the_kernel_for_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = in_cage_or_simulated(tmp_path, monkeypatch, 160, "ramp", mib_per_s=512)
    check(tmp_path, done, "killed by the kernel for memory", HALVED, "he kernel killed the worker: out of memory")
    assert done.summary()["generations"][0]["ended"] == "signal 9"
    assert "set memory.limit below" in done.stderr


def test_a_child_killed_by_the_kernel_for_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = in_cage_or_simulated(tmp_path, monkeypatch, 220, "child_eats")
    check(
        tmp_path,
        done,
        "killed by the kernel for memory",
        HALVED,
        "he kernel killed a child of the worker",
        "BrokenProcessPool",
    )


def in_cage_or_simulated(
    folder: Path, monkeypatch: pytest.MonkeyPatch, limit_mib: int, mode: str, **args: Any
) -> harness.Foreground:
    """In a control group with this limit. Where none can be made, the death and the kernel's count are simulated."""
    try:
        with cage(limit_mib) as group:
            monkeypatch.setenv(WORKER_VARIABLE, worker_in(group))
            return die(folder, mode, trains=True, **args)
    except NoCageError as reason:
        warnings.warn(f"no control group could be made, so the kill is simulated: {reason}", stacklevel=2)
    if mode == "ramp":
        return simulated(folder, monkeypatch, True, "self_kill")
    return simulated(folder, monkeypatch, True, **recorded("python-pool"))


def simulated(
    folder: Path, monkeypatch: pytest.MonkeyPatch, killed: bool | None, mode: str, **args: Any
) -> harness.Foreground:
    """The kernel's count reports `killed`, whatever happened."""
    (folder / "seam").mkdir()
    (folder / "seam/sitecustomize.py").write_text(
        "import sys\n"
        "if 'mlx_supervisor' in sys.orig_argv:\n"
        "    from mlx_supervisor.process import child\n"
        f"    child.OomKills.happened = lambda self: {killed}\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(folder / "seam"), prepend=os.pathsep)
    return die(folder, mode, **args)


def test_without_a_control_group_the_kill_is_simulated_and_the_reason_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlx_supervisor.host.cgroup.find", lambda: None)
    with pytest.warns(UserWarning, match="the kill is simulated: this system has no memory control groups"):
        done = in_cage_or_simulated(tmp_path, monkeypatch, 160, "ramp", mib_per_s=512)
    check(tmp_path, done, "killed by the kernel for memory", HALVED, "he kernel killed the worker: out of memory")


def test_killed_externally(tmp_path: Path) -> None:
    check(tmp_path, die(tmp_path, "self_kill"), "killed externally", KEPT, "nother process sent the worker SIGKILL")


def test_killed_where_the_kernel_counts_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = simulated(tmp_path, monkeypatch, None, "self_kill")
    check(tmp_path, done, "killed externally", KEPT, "nother process sent the worker SIGKILL")


# ---- memory


def test_memory_error(tmp_path: Path) -> None:
    check(tmp_path, die(tmp_path, "memory_error"), "out of memory", HALVED, "MemoryError (deaths.py:")


def test_pressure(tmp_path: Path) -> None:
    done = die(tmp_path, "ramp", mib_per_s=256, memory={"limit": "250 MiB"})
    check(tmp_path, done, "memory pressure", HALVED, " MiB, limit 250")


def test_a_fatal_signal_near_the_limit(tmp_path: Path) -> None:
    memory = {"limit": "300 MiB", "sample_interval_s": 0.05}
    done = die(tmp_path, "segfault_near_limit", hold_mib=272, memory=memory)
    check(tmp_path, done, "memory pressure", HALVED, "SIGSEGV at deaths.py:", "near the memory limit")


def test_a_leak(tmp_path: Path) -> None:
    args = {"leak_mib": 16, "delay_s": 0.03}
    settings = harness.write_settings(
        tmp_path, args=args, steps=50, batch={"size": 8}, memory={"limit": "600 MiB", "soft_share": 0.9}
    )
    summary = harness.run(settings).summary()
    assert summary["outcome"] == "completed"
    assert summary["replayed_steps"] == 0
    assert summary["generations"][0]["cause"] == "memory leak"
    assert summary["generations"][1]["batch_size"] == 4
    assert records(tmp_path)[0]["cause"] == "memory leak"


# ---- recorded deaths


def recorded(name: str) -> dict[str, Any]:
    """How the worker must die: with these errors in its bye, or with this stderr."""
    if name in RAISED:
        return {"mode": "fail_as_recorded", "errors": json.dumps(RAISED[name]["errors"])}
    return {
        "mode": "die_as_recorded",
        "stderr": str(DIAGNOSIS / "stderr" / f"{name}.txt"),
        "exit": EXITS[name]["exit"],
    }


@pytest.mark.parametrize(
    ("name", "cause", "batches"),
    [
        ("metal-oom-abort", "device out of memory", HALVED),
        ("cuda-oom-raised", "device out of memory", HALVED),
        ("metal-resource-limit", "Metal resource limit", KEPT),
        ("metal-interactivity-abort", "GPU watchdog", KEPT),
        ("cuda-illegal-access", "GPU error", KEPT),
    ],
)
def test_what_the_gpu_did(tmp_path: Path, name: str, cause: str, batches: list[int]) -> None:
    done = die(tmp_path, **recorded(name))
    check(tmp_path, done, cause, batches, (EXITS | RAISED)[name]["text"])
    if cause == "GPU watchdog":
        assert "not the batch" in done.stderr, "the advice"


# ---- the user's code


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        ("user_error", "KeyError: 'label' (deaths.py:"),
        ("handled_long_ago", "KeyError: 'no such key' (deaths.py:"),
        ("full_disk", "No space left on device (deaths.py:"),
        ("segfault", "SIGSEGV at deaths.py:"),
    ],
)
def test_errors_of_the_users_code_keep_the_batch(tmp_path: Path, mode: str, words: str) -> None:
    check(tmp_path, die(tmp_path, mode), "crash", KEPT, words)


def test_an_error_whose_bye_was_lost_is_read_from_stderr(tmp_path: Path) -> None:
    done = die(tmp_path, "memory_error", says_bye=False)
    check(tmp_path, done, "out of memory", HALVED, "MemoryError (deaths.py:")


def test_an_error_while_handling_one_of_memory(tmp_path: Path) -> None:
    done = die(tmp_path, "failed_handler")
    check(tmp_path, done, "device out of memory", HALVED, "failed: out of memory", "then KeyError")


def test_the_same_error_again_and_again_is_the_end(tmp_path: Path) -> None:
    done = die(tmp_path, "user_error", generations=99, restart={"max_same_error": 2, "max_without_progress": 9})
    summary = done.summary()
    assert (done.process.returncode, summary["outcome"]) == (1, "failed")
    assert "KeyError: 'label' (deaths.py:" in summary["reason"]
    assert [each["cause"] for each in summary["generations"]] == ["crash"] * 2
    assert {each["batch_size"] for each in summary["generations"]} == {8}
    assert json.loads((tmp_path / "state/runs/run/summary.json").read_text())["reason"] == summary["reason"]


def test_a_loss_that_is_not_finite(tmp_path: Path) -> None:
    done = die(tmp_path, "not_finite")
    check(tmp_path, done, "the loss is not a finite number", KEPT, "oss became NaN")
    assert "learning rate" in done.stderr


# ---- the supervisor, the machine


def change_journal(folder: Path, statement: str, values: Mapping[str, object]) -> None:
    with closing(sqlite3.connect(folder / "state/journal.db")) as connection, connection:
        connection.execute(statement, values)


def power_cut(folder: Path, settings: Path, again: Callable[[], None]) -> harness.Foreground:
    """Supervisor and worker die at once, in the middle of a step; `again`: what is done before the next start."""
    with harness.Foreground(settings) as foreground:
        foreground.until("step ")
        harness.eventually(lambda: harness.journaled_steps(folder) > 0)
        tokens = harness.tokens_of(foreground.process.pid)
        foreground.process.kill()
        for process in harness.carriers(tokens):
            process.kill()
        foreground.process.wait()
        harness.eventually(lambda: not harness.carriers(tokens))
    again()
    return harness.run(settings)


def test_the_machine_restarted(tmp_path: Path) -> None:
    settings = harness.write_settings(
        tmp_path, args={"delay_s": 0.01}, steps=60, batch={"size": 8}, restart={"reboot_cooldown_s": 0.3}
    )
    done = power_cut(
        tmp_path, settings, lambda: change_journal(tmp_path, "UPDATE generations SET boot_id = :id", {"id": "another"})
    )
    summary = done.summary()
    assert summary["outcome"] == "completed"
    assert [each["cause"] for each in summary["generations"]] == ["the machine restarted", "completed"]
    assert [each["batch_size"] for each in summary["generations"]] == KEPT


def test_the_supervisor_died_with_its_worker(tmp_path: Path) -> None:
    settings = harness.write_settings(tmp_path, args={"delay_s": 0.01}, steps=60, batch={"size": 8})
    summary = power_cut(tmp_path, settings, lambda: None).summary()
    assert [each["cause"] for each in summary["generations"]] == ["the supervisor died", "completed"]
    assert [each["batch_size"] for each in summary["generations"]] == KEPT
