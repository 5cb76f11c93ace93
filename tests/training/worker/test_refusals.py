"""Invalid input is refused in one sentence that names the place and the problem."""

import subprocess
import sys
from pathlib import Path

import pytest

from mlx_supervisor import wire

HERE = Path(__file__).parents[1]


def refusal(worker):
    assert worker.process.returncode == wire.EXIT_REFUSED, worker.stderr
    assert worker.bye.outcome == "refused"
    assert "Traceback" not in worker.stderr
    assert worker.stderr.splitlines()[-1] == f"refused: {worker.bye.reason}"
    assert not worker.of(wire.Ready)
    return worker.bye.reason


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        ("toy_task", "task.entry: expected \"package.module:function\", found 'toy_task'"),
        ("no_such_module:build", "cannot import no_such_module from"),
        ("toy_tsk:build", f"from {HERE}: no file toy_tsk.py there; did you mean toy_task?"),
        ("toy_task:nothing", "has no 'nothing'"),
        ("toy_task:bulid", "has no 'bulid'; did you mean build?"),
        ("toy_task:LIMIT", "must be a function that returns a Task, found int"),
        ("toy_task:not_a_task", "must return an mlx_worker.task.Task, found dict"),
        ("toy_task:frozen", "no trainable parameters"),
    ],
)
def test_wrong_entry(supervisor, entry, text):
    assert text in refusal(supervisor.run(supervisor.job(entry=entry)))


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"args": {"hiden": 4}}, "task.args: do not fit toy_task:build"),
        ({"args": {"samples": 0}}, "Task.dataset is empty"),
        ({"batch": {"size": 49}}, "effective batch of 49 samples (batch.size = 49) exceeds the dataset's 48"),
        ({"batch": {"size": 8, "effective": 64}}, "effective batch of 64 samples (batch.size = 8) exceeds"),
        ({"batch": {}}, "batch.size is missing"),
        ({"steps": None}, "steps is missing"),
    ],
)
def test_wrong_job(supervisor, fields, text):
    assert text in refusal(supervisor.run(supervisor.job(**fields)))


def test_a_loss_that_is_no_scalar(supervisor):
    worker = supervisor.run(supervisor.job(entry="toy_task:bad_loss"))
    assert worker.process.returncode == wire.EXIT_REFUSED
    assert "must return a scalar mean, or (scalar mean, weight)" in worker.bye.reason
    assert worker.bye.reason.endswith("found an array of shape (8, 2)")


def test_a_loss_that_reads_values_cannot_be_compiled(supervisor):
    worker = supervisor.run(supervisor.job(entry="toy_task:reads_a_value"), compiled=True)
    assert worker.process.returncode == wire.EXIT_REFUSED
    assert "Task.loss reads an array's value at " in worker.bye.reason
    assert "toy_task.py:" in worker.bye.reason
    assert worker.bye.reason.endswith("or return Task(…, compile=False)")
    other = supervisor.run(supervisor.job(entry="toy_task:reads_a_value_uncompiled", steps=1), compiled=True)
    assert other.process.returncode == wire.EXIT_COMPLETED


def test_user_code_that_exits_is_refused_whatever_its_status(supervisor):
    worker = supervisor.run(supervisor.job(entry="toy_task:leaves"))
    assert worker.process.returncode == wire.EXIT_REFUSED
    assert ".task.entry: toy_task:leaves: SystemExit: 0 (" in worker.bye.reason


def test_the_same_error_after_an_update_is_a_crash(supervisor):
    """What worked before may work again."""
    worker = supervisor.run(supervisor.job(entry="odd_tasks:failing_later", args={"at": 3}))
    assert worker.process.returncode == wire.EXIT_FAILED
    assert worker.bye.reason == "ValueError: no more"


@pytest.mark.parametrize("content", [None, b"", b"{", b'{"run": "x"}', b'{"v": 2}'])
def test_a_broken_job_file(tmp_path, content):
    file = tmp_path / "job.json"
    if content is not None:
        file.write_bytes(content)
    done = subprocess.run([sys.executable, "-m", "mlx_worker", str(file)], capture_output=True, text=True, timeout=60)
    assert done.returncode == wire.EXIT_REFUSED
    assert done.stderr.startswith(f"refused: {file}: ")
    assert len(done.stderr.splitlines()) == 1


def test_the_start_folder_does_not_shadow_libraries(tmp_path):
    for name in ("mlx_supervisor", "msgspec", "argparse"):
        (tmp_path / f"{name}.py").write_text("raise SystemError('shadowed')\n")
    command = [sys.executable, "-m", "mlx_worker", "none.json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == wire.EXIT_REFUSED, done.stderr


def test_a_users_files_do_not_shadow_the_workers(supervisor, tmp_path):
    """The folder of the settings has modules named like the worker's, like its libraries, and like the start folder."""
    for name in ("worker", "mlx_worker", "mlx_supervisor", "msgspec", "zmq", "stream", "checkpoints", "loop"):
        (tmp_path / f"{name}.py").write_text("raise SystemError('shadowed')\n")
    (tmp_path / "mine.py").write_text(
        "from pathlib import Path\nimport importlib.util\n"
        f"spec = importlib.util.spec_from_file_location('toy', {str(HERE / 'toy_task.py')!r})\n"
        "toy = importlib.util.module_from_spec(spec)\nspec.loader.exec_module(toy)\nbuild = toy.build\n"
    )
    task = {"kind": "python", "base_dir": str(tmp_path), "entry": "mine:build"}
    worker = supervisor.run(supervisor.job(steps=1, batch={"size": 8}, task=task))
    assert worker.process.returncode == wire.EXIT_COMPLETED, worker.stderr
