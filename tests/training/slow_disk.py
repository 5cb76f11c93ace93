"""The toy task on a slow disk, so that tests can act during a write."""

import time
from typing import Any

from toy_task import build as build_toy

from mlx_worker.checkpoint import durable_files
from mlx_worker.task import Task


def build(seed: int, flush_s: float, **args: Any) -> Task:
    """Every flush of a file takes `flush_s`; a checkpoint has four."""
    flush = durable_files.Files.flush_file

    def slowly(files: durable_files.Files, descriptor: int) -> None:
        time.sleep(flush_s)
        flush(files, descriptor)

    durable_files.Files.flush_file = slowly  # type: ignore[method-assign]
    return build_toy(seed, **args)
