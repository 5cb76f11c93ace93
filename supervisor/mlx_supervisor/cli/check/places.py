"""The folders that a run writes to, checked without leaving a trace."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from mlx_supervisor.core.words import size as shown
from mlx_supervisor.state_dir import StateDirError, require_owned, require_usable, unusable
from mlx_supervisor.wire import RESERVE_BYTES


@dataclass(frozen=True)
class Need:
    """`needed_bytes` that a run will still write below `folder`, and the free room there."""

    folder: Path
    what: str
    needed_bytes: int
    free_bytes: int


def state_dir_problem(path: Path) -> str | None:
    """Why a supervisor can't use this state folder; None if it can. A running supervisor is no reason."""
    try:
        require_usable(path)
        parent = existing(path)
        if parent == path:
            require_owned(path)
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            return unusable(path, f"{parent} can't be written")
    except StateDirError as error:
        return str(error)
    except OSError as error:
        return unusable(path, error.strerror)
    return None


def existing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    return next((each for each in (path, *path.parents) if each.exists()), Path("/"))


def needs(run_dir: Path, output: Path | None, checkpoint_bytes: int, kept: int, output_bytes: int) -> list[Need]:
    """What the run writes, by disk. One checkpoint more than the `kept` ones: an old one goes after the new one."""
    checkpoints = run_dir / "checkpoints"
    written_bytes = size_of(checkpoints)
    state_bytes = max((kept + 1) * checkpoint_bytes - written_bytes, checkpoint_bytes) + RESERVE_BYTES
    state = (checkpoints, f"{kept + 1} checkpoints of {shown(checkpoint_bytes)}, {shown(RESERVE_BYTES)} in reserve")
    if output is None:
        output = run_dir / "export"
    if existing(output).stat().st_dev == existing(checkpoints).stat().st_dev:
        what = state[1] + (f", the result of {shown(output_bytes)}" if output_bytes else "")
        return [_need(state[0], what, state_bytes + output_bytes)]
    return [_need(*state, state_bytes), _need(output, f"the result of {shown(output_bytes)}", output_bytes)]


def _need(folder: Path, what: str, needed_bytes: int) -> Need:
    return Need(folder, what, needed_bytes, shutil.disk_usage(existing(folder)).free)


def size_of(folder: Path) -> int:
    """Bytes of all files in a folder and its folders; 0 if there is none. Files that vanish meanwhile do not count."""
    total = 0
    for base, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(base, name)).st_size  # noqa: PTH118 - many files
            except OSError:
                continue
    return total
