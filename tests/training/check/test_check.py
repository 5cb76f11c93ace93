"""`mlx-supervisor check` with the real worker: what it reports, what it refuses, and that it leaves no trace."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.process import harness

from mlx_supervisor.state_dir import StateDir

TASK = Path(__file__).with_name("wide_task.py")


def check(settings: Path, *arguments: str) -> tuple[dict[str, Any], subprocess.CompletedProcess[str]]:
    """The report of `check --json`, and the finished process."""
    command = [sys.executable, "-m", "mlx_supervisor", "check", str(settings), "--json", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    return json.loads(done.stdout), done


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if "__pycache__" not in path.parts}


def lora(folder: Path, llama_dir: Path, **changes: Any) -> Path:
    """A settings file in `folder` for the tiny model."""
    values = {
        "model": str(llama_dir / "model"), "data": str(llama_dir / "text"), "batch_size": 4, "iters": 12,
        "num_layers": 2, "max_seq_length": 64, "adapter_path": "adapters", "val_batches": 1,
    }  # fmt: skip
    (folder / "lora.yaml").write_text(yaml.safe_dump(values | changes))
    path = folder / "settings.toml"
    path.write_text('state_dir = "state"\n[runs.run.task]\nkind = "mlx_lm"\nconfig = "lora.yaml"\n')
    return path


def wide(folder: Path, **tables: Any) -> Path:
    """A settings file for a python task whose logits make memory grow by some MiB per sample."""
    (folder / "wide_task.py").write_text(TASK.read_text())
    args = tables.pop("args", {})
    return harness.write_settings(folder, args=args, steps=12, entry="wide_task:build", **tables)


def test_a_run_that_is_fine_is_described_and_left_untouched(tmp_path: Path, llama_dir: Path) -> None:
    settings = lora(tmp_path, llama_dir)
    before = tree(tmp_path)
    report, done = check(settings)
    assert done.returncode == 0, done.stderr
    assert report["ok"]
    assert report["report"]["architecture"] == "llama"
    assert 0 < report["report"]["trainable"] == report["report"]["adapters"] < report["report"]["parameters"]
    assert (report["report"]["batch_size"], report["report"]["steps"]) == (4, 12)
    train, valid = report["report"]["data"]
    assert (train["samples"], valid["samples"]) == (24, 24)
    assert train["longest"] > 64
    assert (train["truncated"] > 0, train["cut_tokens"] > train["truncated"]) == (True, True)
    assert any("longer than max_seq_length" in warning for warning in report["warnings"])
    assert report["report"]["shapes"][0] == "int32 [4, 64]"
    assert tree(tmp_path) == before


def test_a_run_can_be_checked_while_its_supervisor_runs(tmp_path: Path, llama_dir: Path) -> None:
    settings = lora(tmp_path, llama_dir)
    state = StateDir(tmp_path / "state")  # holds the lock
    before = tree(tmp_path)
    _, done = check(settings)
    state.close()
    assert done.returncode == 0, done.stderr
    assert tree(tmp_path) == before


def test_what_a_run_would_be_refused_for_is_named(tmp_path: Path, llama_dir: Path) -> None:
    (tmp_path / "taken").write_text("a file, not a folder")
    report, done = check(lora(tmp_path, llama_dir, adapter_path="taken/adapters"))
    assert done.returncode == 2
    assert "taken/adapters" in report["problems"][0]
    (tmp_path / "state").write_text("a file, not a folder")
    report, done = check(lora(tmp_path, llama_dir, learning_rat=1e-4))
    assert done.returncode == 2
    assert "state_dir" in report["problems"][0]
    assert "lora.yaml: learning_rat" in report["problems"][1]
    assert report["problems"][1] in done.stderr


def test_a_start_that_would_resume_is_announced_with_what_changed(tmp_path: Path, llama_dir: Path) -> None:
    settings = lora(tmp_path, llama_dir, iters=4)
    assert harness.run(settings, trains=True).process.returncode == 0
    before = tree(tmp_path / "state" / "runs")
    report, done = check(lora(tmp_path, llama_dir, iters=8, learning_rate=5e-4))
    assert done.returncode == 0, done.stderr
    assert report["report"]["resumes_at"] == 4
    assert any("earning rate" in warning for warning in report["warnings"])
    report, done = check(lora(tmp_path, llama_dir, iters=8, lora_parameters={"rank": 2, "scale": 1.0, "dropout": 0.0}))
    assert done.returncode == 2
    assert "--fresh" in report["problems"][0]
    assert tree(tmp_path / "state" / "runs") == before


def test_arrays_that_no_longer_fit_the_checkpoint_are_refused_as_a_start_refuses_them(tmp_path: Path) -> None:
    assert harness.run(wide(tmp_path, args={"vocabulary": 512}), trains=True).process.returncode == 0
    settings = wide(tmp_path, args={"vocabulary": 256})
    report, done = check(settings)
    assert done.returncode == 2
    assert report["warnings"] == []
    assert "the task's trained arrays differ from the checkpoint's" in report["problems"][0]
    assert "[512, " in report["problems"][0]
    command = [sys.executable, "-m", "mlx_supervisor", "check", str(settings)]
    shown = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    assert "from the checkpoint of step" not in shown
    assert harness.run(settings, trains=True).process.returncode == 2


def test_an_error_of_a_python_task_is_named(tmp_path: Path) -> None:
    report, done = check(wide(tmp_path, args={"vocabulary": 0}))
    assert done.returncode == 2
    assert "ZeroDivisionError" in report["problems"][0]


def test_the_report_for_people_names_shapes_and_sizes(tmp_path: Path) -> None:
    settings = wide(tmp_path, batch={"size": 3})
    command = [sys.executable, "-m", "mlx_supervisor", "run", str(settings), "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "int32 [3, 64]" in done.stdout
    assert "train: 16 samples" in done.stdout
    assert "No problems found" in done.stdout
    assert not (tmp_path / "state").exists()


def test_a_limit_below_what_the_process_holds_is_a_problem(tmp_path: Path) -> None:
    report, done = check(wide(tmp_path, args={"vocabulary": 100_000}, memory={"limit": "64 MiB"}))
    assert done.returncode == 2
    assert "memory.limit" in report["problems"][0]


def test_measured_sizes_need_more_memory_the_larger_they_are(tmp_path: Path) -> None:
    settings = wide(tmp_path, args={"samples": 2}, batch={"size": 1}, memory={"limit": "2 GiB"})
    report, done = check(settings, "--measure")
    assert done.returncode == 0, done.stderr
    measured = report["measured"]
    assert (measured["largest"], measured["at_most"]) == (2, 2)
    one, two = measured["sizes"]
    assert one["measured"]
    assert two["measured"]
    assert two["peak_bytes"] > one["peak_bytes"] > report["report"]["held_bytes"]
    assert two["device_bytes"] > 1.3 * one["device_bytes"]
    assert one["seconds_per_update"] > 0
    assert not (tmp_path / "state").exists()


@pytest.mark.long
def test_the_size_that_is_named_runs_and_a_quarter_more_trips(tmp_path: Path) -> None:
    args = {"vocabulary": 4096, "length": 256, "samples": 64}
    memory = {"limit": "420 MiB"}
    report, done = check(wide(tmp_path, args=args, batch={"size": 2}, memory=memory), "--measure")
    assert done.returncode == 0, done.stderr
    largest = report["measured"]["largest"]
    assert 2 < largest < 64
    for size in (largest, largest * 5 // 4 + 1):  # a size more needs 2 % more here: within the reserve
        folder = tmp_path / str(size)
        folder.mkdir()
        summary = harness.run(wide(folder, args=args, batch={"size": size}, memory=memory), trains=True).summary()
        assert (summary["trips"] > 0) == (size > largest), (size, summary)
        if size == largest:
            peak = max(each["peak_footprint_mib"] for each in summary["generations"]) * 2**20
            predicted = next(each["peak_bytes"] for each in report["measured"]["sizes"] if each["batch_size"] == size)
            assert abs(predicted / peak - 1) < 0.15
