"""macOS' reports of the processes that it killed for memory (jetsam), read after a worker died by SIGKILL.

The layout is Apple's ("Identifying high-memory use with jetsam event reports"): a line of JSON as header, then a body
whose `processes` have a `reason` if they were killed. Tested with constructed reports only. macOS does not report every
such kill, and only administrators may read the folder.
"""

import asyncio
import os
import time
from contextlib import suppress
from datetime import datetime
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path

import msgspec

FOLDER = Path("/Library/Logs/DiagnosticReports")
PATTERN = "JetsamEvent-*.ips"
REPORT_LIMIT_BYTES = 4 * 1024 * 1024
"""Longer reports are skipped; published ones have a tenth of it."""
REPORTS_AT_MOST = 8
"""The newest ones since the worker started."""
ENTRIES_AT_MOST = 10_000
CLOCK_SLACK_S = 2.0
POLL_S = 0.2
OTHER_REASONS = frozenset({"vnode-limit", "disk-space-shortage"})
"""Reasons of jetsam other than memory (bsd/kern/kern_memorystatus.c)."""


class _Process(msgspec.Struct):
    pid: int | None = None
    reason: str | None = None


class _Body(msgspec.Struct):
    processes: list[_Process]
    date: str = ""


class _Header(msgspec.Struct):
    timestamp: str = ""


def killed(pid: int, since_wall_s: float, folder: Path | None = None) -> bool | None:
    """Whether a report names this process as killed for memory after `since_wall_s` (its start; Unix seconds).

    `folder`: instead of `FOLDER`. None where reports can't be read. False is no proof. Never raises.
    """
    try:
        paths = _newest(folder or FOLDER, since_wall_s)
    except OSError:
        return None
    return any(_names(path, pid, since_wall_s) for path in paths)


async def killed_within(pid: int, since_wall_s: float, wait_s: float, folder: Path | None = None) -> bool | None:
    """As `killed`, but wait up to `wait_s` seconds for the report. Returns None at once where none can be read."""
    deadline_s = time.monotonic() + wait_s
    while True:
        found = await asyncio.to_thread(killed, pid, since_wall_s, folder)
        if found is not False or time.monotonic() >= deadline_s:
            return found
        await asyncio.sleep(POLL_S)


def _newest(folder: Path, since_wall_s: float) -> list[Path]:
    found: list[tuple[float, str]] = []
    with os.scandir(folder) as entries:
        for entry in islice(entries, ENTRIES_AT_MOST):
            if fnmatchcase(entry.name, PATTERN):
                with suppress(OSError):
                    status = entry.stat(follow_symlinks=False)
                    if status.st_mtime >= since_wall_s - CLOCK_SLACK_S and status.st_size <= REPORT_LIMIT_BYTES:
                        found.append((status.st_mtime, entry.path))
    return [Path(path) for _, path in sorted(found, reverse=True)[:REPORTS_AT_MOST]]


def _names(path: Path, pid: int, since_wall_s: float) -> bool:
    """Whether this report names the process; False when it can't be read."""
    try:
        with path.open("rb") as file:
            data = file.read(REPORT_LIMIT_BYTES + 1)
        head, _, rest = data.partition(b"\n")
        header = msgspec.json.decode(head, type=_Header)
        body = msgspec.json.decode(rest, type=_Body)
        at_wall_s = _wall_s(body.date or header.timestamp)
    except (OSError, ValueError, RecursionError):
        return False
    return at_wall_s >= since_wall_s - CLOCK_SLACK_S and any(
        process.pid == pid and process.reason is not None and process.reason not in OTHER_REASONS
        for process in body.processes
    )


def _wall_s(text: str) -> float:
    """`2026-06-20 09:02:10.42 +0100`; Raises ValueError for anything else."""
    return datetime.strptime(text, "%Y-%m-%d %H:%M:%S.%f %z").timestamp()
