"""The state folder of a settings file that names none: one for each file, so that projects never share runs."""

import hashlib
import os
import re
from pathlib import Path

import platformdirs

from mlx_supervisor.settings.paths import DEFAULT_FILE
from mlx_supervisor.state_dir import PROJECTS, SOCKET_PATH_LIMIT_BYTES, TELEMETRY_SOCKET

HASH_DIGITS = 6
NAME_LIMIT = 40


def default_state_dir(file: Path) -> Path:
    """The state folder of the settings file `file`, or of another file that stands for one.

    That of `DEFAULT_FILE` is the user's state folder; any other file has `projects/FOLDER-HASH` in it: the name of the
    file's folder, and the first digits of the SHA-256 of its path, links resolved. The name is shortened, or left out,
    where the sockets' paths would be too long.
    """
    base = platformdirs.user_state_path("mlx-supervisor")
    try:
        path, default = file.expanduser().resolve(), DEFAULT_FILE.expanduser().resolve()
    except RuntimeError:  # no home folder
        path, default = file.absolute(), None
    if path == default:
        return base
    digest = hashlib.sha256(os.fsencode(path)).hexdigest()[:HASH_DIGITS]
    used = len(os.fsencode(base / PROJECTS / f"-{digest}" / TELEMETRY_SOCKET))
    name = _readable(path.parent.name)[: max(min(SOCKET_PATH_LIMIT_BYTES - used, NAME_LIMIT), 0)].rstrip(".-")
    return base / PROJECTS / (f"{name}-{digest}" if name else digest)


def _readable(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-")
