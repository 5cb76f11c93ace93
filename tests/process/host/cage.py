"""A memory control group (cgroup) for a worker that the kernel is to kill."""

import contextlib
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tests.process.harness import MISBEHAVE, PATIENCE_S

from mlx_supervisor.host import cgroup

MIB = 1024 * 1024


class NoCageError(Exception):
    """No group can be made on this machine; the text says why."""


@contextlib.contextmanager
def cage(limit_mib: int) -> Iterator[Path]:
    """A new group below the current one, or below the top, with this limit and no swap. Raises NoCageError."""
    group = cgroup.find()
    if group is None:
        raise NoCageError("this system has no memory control groups")
    problems = []
    for parent in dict.fromkeys((group.folder, group.mount)):
        folder = parent / f"mlx-supervisor-test-{os.getpid()}-{time.monotonic_ns()}"
        try:
            folder.mkdir()
            _limit(folder, group.version, limit_mib * MIB)
            subprocess.run(["sh", "-c", f"echo $$ > {shlex.quote(str(folder / 'cgroup.procs'))}"], check=True)
            break
        except (OSError, subprocess.CalledProcessError) as error:
            problems.append(f"{parent}: {error}")
            with contextlib.suppress(OSError):
                folder.rmdir()
    else:
        raise NoCageError("; ".join(problems))
    try:
        yield folder
    finally:
        _remove(folder)


def _limit(folder: Path, version: int, limit_bytes: int) -> None:
    limit, swap = ("memory.limit_in_bytes", None) if version == 1 else ("memory.max", "memory.swap.max")
    (folder / limit).write_text(str(limit_bytes))
    if swap is None:
        with contextlib.suppress(OSError):  # swap is counted only by some kernels
            (folder / "memory.memsw.limit_in_bytes").write_text(str(limit_bytes))
    elif (folder / swap).exists():
        (folder / swap).write_text("0")


def _remove(folder: Path) -> None:
    """Remove the group as soon as it is empty."""
    deadline_s = time.monotonic() + PATIENCE_S
    while True:
        try:
            folder.rmdir()
            return
        except OSError:
            if time.monotonic() > deadline_s:
                raise
            time.sleep(0.05)


def worker_in(folder: Path) -> str:
    """The command line of a misbehaving worker that moves into the group before it does anything else."""
    script = f'echo $$ > {shlex.quote(str(folder / "cgroup.procs"))} && exec "$0" "$@"'
    return shlex.join(["sh", "-c", script, sys.executable, str(MISBEHAVE)])
