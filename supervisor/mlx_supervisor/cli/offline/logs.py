"""`mlx-supervisor logs`: the end of a run's log, and what is appended."""

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from mlx_supervisor.cli.offline import places, runs
from mlx_supervisor.control.log_reader import POLL_INTERVAL_S, Follower

TAIL_LIMIT_BYTES = 4 * 1024 * 1024


def logs(words: Sequence[str], state_dir: Path | None, *, follow: bool, stderr: bool, lines: int) -> int:
    """Print the last `lines` lines; with `follow`, all further text until Ctrl-C. Returns the exit status."""
    given = places.find(words, state_dir)
    run = runs.one(given.places, given.names)
    path = run.folder / "logs" / ("stderr.log" if stderr else "stdout.log")
    if not path.exists():
        print(f"{path}: no log yet; {run.name} is {run.state}", file=sys.stderr)
        return 1
    follower = Follower(path, from_end_bytes=0) if follow else None
    try:
        for line in last_lines(path, lines):
            print(line)
        sys.stdout.flush()
        if follower is not None:
            _follow(follower)
    except KeyboardInterrupt:
        pass
    finally:
        if follower is not None:
            follower.close()
    return 0


def last_lines(path: Path, count: int) -> list[str]:
    """The last `count` lines of a log, with its rotated copies; of at most 4 MiB."""
    text, number, part = "", 0, path
    while part.exists() and text.count("\n") <= count and len(text) < TAIL_LIMIT_BYTES:
        with part.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - TAIL_LIMIT_BYTES, 0))
            text = file.read().decode("utf-8", "replace") + text
        number += 1
        part = path.with_name(f"{path.name}.{number}")
    found = text.splitlines()
    return found[-count:] if count else []


def _follow(follower: Follower) -> None:
    while True:
        text = follower.poll()
        if text:
            sys.stdout.write(text)
            sys.stdout.flush()
        else:
            time.sleep(POLL_INTERVAL_S)
