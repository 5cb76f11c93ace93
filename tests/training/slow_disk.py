"""The toy task on a slow disk, so that tests can act during a write, and on a full one."""

import errno
import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from toy_task import build as build_toy

from mlx_worker.checkpoint import durable_files
from mlx_worker.task import Task, Update
from mlx_worker.training import finishing


def build(seed: int, flush_s: float, **args: Any) -> Task:
    """Every flush of a file takes `flush_s`; a checkpoint has four."""
    flush = durable_files.Files.flush_file

    def slowly(files: durable_files.Files, descriptor: int) -> None:
        time.sleep(flush_s)
        flush(files, descriptor)

    durable_files.Files.flush_file = slowly  # type: ignore[method-assign]
    return build_toy(seed, **args)


def full(
    seed: int, flag: str, from_step: int = 0, export_dir: str | None = None, give_up_s: float | None = None, **args: Any
) -> Task:
    """While the file `flag` exists, the disk of the checkpoints is full; after update `from_step` it is made.

    The disk of the export has room; but if `export_dir` is given, it is then replaced by a file, and the disk of the
    checkpoints has room.
    """
    write = durable_files.Files.write

    def refusing(files: durable_files.Files, descriptor: int, data: memoryview) -> int:
        if Path(flag).exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(files, descriptor, data)

    def fill(update: Update) -> None:
        if update.step != from_step:
            return
        if export_dir is None:
            Path(flag).touch()
        else:
            shutil.rmtree(export_dir)
            Path(export_dir).write_text("a file in the way")

    durable_files.Files.write = refusing  # type: ignore[method-assign]
    finishing.FIRST_PAUSE_S = 0.2
    finishing.WAIT_LIMIT_S = give_up_s or finishing.WAIT_LIMIT_S
    task = build_toy(seed, **args)
    task.after_update = fill
    task.export_dir = None if export_dir is None else Path(export_dir)
    return task


def cramped(seed: int, free_mib: int, hidden: int = 16) -> Task:
    """The disk of the checkpoints has `free_mib` left."""
    shutil.disk_usage = lambda path: SimpleNamespace(free=free_mib * 2**20)  # type: ignore[assignment]
    return build_toy(seed, hidden=hidden)
