"""`samples.jsonl` has every update's line once and whole, whatever the disk does."""

import errno
import json
import os
import resource
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.training import jobs

from mlx_worker.data import line_log
from mlx_worker.data.sample_log import SampleLog


def log_in(folder: Path, generation: int = 1) -> SampleLog:
    return SampleLog(
        jobs.job(
            run_dir=str(folder), generation=generation, task={"kind": "python", "base_dir": str(folder)},
            batch={"size": 2, "sample_log": True},
        )
    )  # fmt: skip


def steps_in(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "samples.jsonl").read_text().splitlines()]


@contextmanager
def full_after(size_bytes: int) -> Iterator[None]:
    """No file may grow past this size: the kernel writes a part of the data, then refuses."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, old)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(line_log, "FIRST_PAUSE_S", 0.0)


def test_a_line_torn_by_a_full_disk_is_completed_when_there_is_room(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = log_in(tmp_path)
    with full_after(100):
        for step in (1, 2, 3):
            log.write(step, 0, [7, 8])
    assert (tmp_path / "samples.jsonl").stat().st_size == 100, "a part of a line"
    log.write(4, 0, [7, 8])
    log.close()
    assert steps_in(tmp_path) == [1, 2, 3, 4]
    said = capsys.readouterr().err
    assert said.count("cannot write samples.jsonl") == said.count("is written again") == 1


@pytest.mark.parametrize(
    ("tail", "steps"), [('{"generation": 1, "st', [1, 5]), ('{"generation": 1, "step": 4, "samples": []}', [1, 4, 5])]
)
def test_the_torn_line_of_a_dead_worker_is_not_glued_to_the_next(tmp_path: Path, tail: str, steps: list[int]) -> None:
    (tmp_path / "samples.jsonl").write_text('{"step": 1}\n' + tail)
    log = log_in(tmp_path, generation=2)
    log.write(5, 0, [1])
    log.close()
    assert steps_in(tmp_path) == steps


def test_a_torn_line_longer_than_a_block_is_cut_off_too(tmp_path: Path) -> None:
    (tmp_path / "samples.jsonl").write_text('{"step": 1}\n' + '{"samples": [' + "1, " * 100_000)
    log_in(tmp_path).close()
    assert steps_in(tmp_path) == [1]


@pytest.mark.parametrize("code", [errno.EROFS, errno.EIO, errno.EDQUOT, errno.ESTALE])
def test_a_disk_that_fails_from_the_start_costs_no_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    opened, failing = os.open, [True]

    def open_or_fail(path: str, flags: int, *args: int, **more: int) -> int:
        if failing[0] and str(path).endswith("samples.jsonl"):
            raise OSError(code, os.strerror(code))
        return opened(path, flags, *args, **more)

    monkeypatch.setattr(os, "open", open_or_fail)
    log = log_in(tmp_path)
    log.write(1, 0, [1])
    failing[0] = False
    log.write(2, 0, [1])
    log.close()
    assert steps_in(tmp_path) == [1, 2]


def test_a_deleted_run_folder_is_made_again(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    log = log_in(folder)
    log.write(1, 0, [1])
    shutil.rmtree(folder)
    log.write(2, 0, [1])
    log.close()
    assert steps_in(folder) == [2]


def test_lines_that_are_lost_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(line_log, "LIMIT_BYTES", 200)
    log = log_in(tmp_path)

    with full_after(0):
        for step in range(1, 10):
            log.write(step, 0, [1])
        log.close()
    assert "samples.jsonl lacks lines: 9 of steps 1 to 9 (File too large (EFBIG))" in capsys.readouterr().err
