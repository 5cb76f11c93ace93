"""Logs stay bounded and complete, and a full disk never raises into the caller."""

import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from mlx_supervisor.logs import daemon_log
from mlx_supervisor.logs.daemon_log import configure
from mlx_supervisor.logs.run_log import LINE_LIMIT, RunLog


@pytest.fixture(autouse=True)
def restore() -> Iterator[None]:
    level = logging.getLogger().level
    yield
    structlog.reset_defaults()
    logging.basicConfig(handlers=[logging.NullHandler()], level=level, force=True)


@pytest.fixture
def run_log(tmp_path: Path) -> Iterator[RunLog]:
    log = RunLog(tmp_path / "logs", max_bytes=1000, backups=2)
    yield log
    log.close()


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_lines_are_json_in_the_file_and_readable_on_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "state" / "supervisor.log"
    configure(path, console=True, level="info")
    structlog.get_logger("daemon").info("spawned", run="night", pid=42, path=Path("/x"))
    structlog.get_logger("daemon").debug("below the level")
    logging.getLogger("asyncio").warning("slow %s", "callback")
    try:
        raise ValueError("odd")
    except ValueError:
        structlog.get_logger().exception("failed")
    first, second, third = lines_of(path)
    assert (first["event"], first["level"], first["run"], first["pid"]) == ("spawned", "info", "night", 42)
    assert first["timestamp"].endswith("Z")
    assert (second["event"], second["level"]) == ("slow callback", "warning")
    assert "ValueError: odd" in third["exception"]
    assert path.stat().st_mode & 0o777 == 0o600
    text = capsys.readouterr().err
    assert "spawned" in text
    assert "\x1b" not in text


def test_configuring_again_replaces_and_the_console_is_optional(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    configure(tmp_path / "a.log", console=True, level="info")
    configure(tmp_path / "b.log", console=False, level="debug")
    structlog.get_logger().debug("once")
    assert not (tmp_path / "a.log").exists()
    assert len(lines_of(tmp_path / "b.log")) == 1
    assert capsys.readouterr().err == ""
    configure(None, console=False, level="info")
    structlog.get_logger().info("nowhere")
    assert len(lines_of(tmp_path / "b.log")) == 1


def test_an_unknown_level_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"found 'loud'; allowed: debug, info"):
        configure(tmp_path / "a.log", console=False, level="loud")


def test_the_supervisors_log_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(daemon_log, "LOG_BYTES", 10_000)
    configure(tmp_path / "a.log", console=False, level="info")
    for number in range(1000):
        structlog.get_logger().info("x" * 100, number=number)
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == ["a.log", "a.log.1", "a.log.2", "a.log.3"]
    assert all(file.stat().st_size <= 10_000 and file.stat().st_mode & 0o777 == 0o600 for file in files)
    assert lines_of(tmp_path / "a.log")[-1]["number"] == 999


def test_a_log_that_cannot_be_opened_raises_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    configure(tmp_path / "file" / "a.log", console=False, level="info")
    structlog.get_logger().error("lost")
    assert capsys.readouterr().err == ""


def test_a_full_disk_loses_lines_and_logs_how_many(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    configure(path, console=False, level="info")
    structlog.get_logger().info("before")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
    try:
        for number in range(100):
            structlog.get_logger().info("x" * 100, number=number)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, old)
    structlog.get_logger().info("after")
    text = path.read_text()
    assert "log_lines_lost: " in text
    assert json.loads(text.splitlines()[-1])["event"] == "after"


def test_a_line_torn_by_a_full_disk_is_not_glued_to_the_next(run_log: RunLog) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        run_log.line("before")
        run_log.line("torn by the disk")
        run_log.line("lost")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, old)
    run_log.line("after")
    run_log.line("last")
    assert run_log.stdout_path.read_text() == "before\ntor\nafter\nlast\n"


def test_a_worker_and_the_supervisor_write_into_one_file(run_log: RunLog) -> None:
    out, err = run_log.descriptors()
    run_log.line("before")
    program = "import sys; print('from the worker', flush=True); print('oh', file=sys.stderr)"
    subprocess.run([sys.executable, "-c", program], stdout=out, stderr=err, check=True, timeout=30)
    run_log.line("after")
    assert run_log.stdout_path.read_text() == "before\nfrom the worker\nafter\n"
    assert run_log.stderr_path.read_text() == "oh\n"
    assert run_log.stdout_path.stat().st_mode & 0o777 == 0o600


def test_descriptors_are_not_inherited_by_accident(run_log: RunLog) -> None:
    assert not any(os.get_inheritable(descriptor) for descriptor in run_log.descriptors())


def test_a_line_is_one_line_without_control_characters(run_log: RunLog) -> None:
    run_log.line("a\nb\r\x1b[31m\tc\x00\x85é\ud800")
    run_log.line("x" * 100_000)
    first, second = run_log.stdout_path.read_bytes().splitlines()
    assert first.decode() == "a b  [31m\tc  é?"
    assert len(second) == LINE_LIMIT


def test_rotation_bounds_every_file_and_keeps_the_end(run_log: RunLog) -> None:
    assert run_log.rotate_if_needed() is False
    for number in range(100):
        run_log.line(f"line {number:04d} " + "x" * 90)
        run_log.rotate_if_needed()
    names = sorted(path.name for path in run_log.folder.iterdir())
    assert names == ["stderr.log", "stdout.log", "stdout.log.1", "stdout.log.2"]
    texts = [(run_log.folder / name).read_text() for name in ("stdout.log.2", "stdout.log.1", "stdout.log")]
    assert all(len(text) <= 1000 + 110 for text in texts)
    numbers = [int(line.split()[1]) for line in "".join(texts).splitlines() if line.startswith("line ")]
    assert numbers == list(range(numbers[0], 100))
    assert all((run_log.folder / name).stat().st_mode & 0o777 == 0o600 for name in names)


def test_a_file_grown_far_over_the_limit_leaves_its_last_part(run_log: RunLog) -> None:
    os.write(run_log.descriptors()[1], b"old " * 10_000 + b"the end")
    assert run_log.rotate_if_needed() is True
    copy = (run_log.folder / "stderr.log.1").read_bytes()
    assert len(copy) == 1000
    assert copy.endswith(b"the end")
    assert run_log.stderr_path.stat().st_size == 0


def test_a_worker_that_writes_after_rotation_writes_at_the_start(run_log: RunLog) -> None:
    program = (
        "import sys; sys.stderr.write('x' * 2000); sys.stderr.flush(); print('ready', flush=True);"
        "sys.stdin.readline(); sys.stderr.write('fresh')"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=run_log.descriptors()[1]
    ) as worker:
        assert worker.stdout is not None
        assert worker.stdin is not None
        worker.stdout.readline()
        run_log.rotate_if_needed()
        worker.stdin.write(b"go\n")
        worker.stdin.close()
    assert run_log.stderr_path.read_text() == "fresh"


def test_tail_is_of_one_generation_and_bounded(run_log: RunLog) -> None:
    err = run_log.descriptors()[1]
    os.write(err, b"generation 1\n")
    offset = run_log.stderr_offset()
    os.write(err, b"generation 2\n" + "é".encode())
    assert run_log.tail_since(offset) == "generation 2\né"
    assert run_log.tail_since(offset, 5) == " 2\né"
    assert run_log.tail_since(run_log.stderr_offset()) == ""
    os.write(err, b"y" * 2000)
    run_log.rotate_if_needed()
    os.write(err, b"after the rotation")
    assert run_log.tail_since(offset + 5000) == "after the rotation"


def test_a_tail_that_was_rotated_away_is_still_read(run_log: RunLog) -> None:
    """A worker may write a lot, then its error, within the same second: the error must not be lost."""
    err = run_log.descriptors()[1]
    os.write(err, b"generation 1\n")
    offset = run_log.stderr_offset()
    os.write(err, b"y" * 2000 + b"\nRuntimeError: bad input data\n")
    assert run_log.rotate_if_needed()
    assert run_log.tail_since(offset, 30) == "\nRuntimeError: bad input data\n"
    os.write(err, b"terminated\n")
    assert run_log.tail_since(offset, 40).endswith("RuntimeError: bad input data\nterminated\n")
    second = run_log.stderr_offset()
    assert run_log.tail_since(second) == ""
    os.write(err, b"generation 2\n" + b"z" * 1200)
    assert run_log.rotate_if_needed()
    assert run_log.tail_since(second, 5000) == "generation 2\n" + "z" * 1200


def test_a_cleared_log_is_not_in_the_tail(run_log: RunLog) -> None:
    offset = run_log.stderr_offset()
    os.write(run_log.descriptors()[1], b"y" * 2000 + b"generation 1\n")
    run_log.rotate_if_needed()
    run_log.clear()
    os.write(run_log.descriptors()[1], b"more")
    assert run_log.tail_since(offset) == "more"


def test_clearing_empties_files_and_removes_copies(run_log: RunLog) -> None:
    os.write(run_log.descriptors()[0], b"x" * 2000)
    run_log.rotate_if_needed()
    run_log.line("more")
    run_log.clear()
    assert sorted(path.name for path in run_log.folder.iterdir()) == ["stderr.log", "stdout.log"]
    assert run_log.stdout_path.read_text() == ""
    run_log.line("again")
    assert run_log.stdout_path.read_text() == "again\n"


def test_a_failing_rotation_still_bounds_the_log(run_log: RunLog) -> None:
    os.write(run_log.descriptors()[1], b"x" * 5000)
    (run_log.folder / "stderr.log.1").touch()
    (run_log.folder / "stderr.log.2" / "full").mkdir(parents=True)  # the older copies cannot move
    run_log.rotate_if_needed()
    assert run_log.stderr_path.stat().st_size == 0
    run_log.close()
    run_log.close()
    run_log.line("never written")
    assert "can't be read" in run_log.tail_since(0)


def test_a_second_log_of_the_same_run_appends(tmp_path: Path) -> None:
    for text in ("one", "two"):
        log = RunLog(tmp_path / "logs")
        log.line(text)
        log.close()
    assert (tmp_path / "logs" / "stdout.log").read_text() == "one\ntwo\n"


def test_deleted_files_are_made_again_and_a_workers_last_words_are_still_read(run_log: RunLog, tmp_path: Path) -> None:
    start = run_log.stderr_offset()
    worker_stderr = os.dup(run_log.descriptors()[1])
    shutil.rmtree(tmp_path / "logs")
    assert run_log.restore_if_deleted()
    assert not run_log.restore_if_deleted(), "once"
    run_log.line("after")
    assert run_log.stdout_path.read_text() == "after\n"
    os.write(worker_stderr, b"Segmentation fault")
    assert run_log.tail_since(start) == "Segmentation fault"
    second = run_log.stderr_offset()
    os.write(run_log.descriptors()[1], b"of the next worker")
    os.close(worker_stderr)
    assert run_log.stderr_path.read_text() == "of the next worker"
    assert run_log.tail_since(second) == "of the next worker"
