"""The settings file's default path; paths in the file start at its folder."""

from __future__ import annotations

from pathlib import Path

DEFAULT_FILE = Path("~/.config/mlx-supervisor/settings.toml")
"""The settings file of `serve` and `supervisorctl` when none is given."""


def resolve(text: str, base: Path) -> Path | None:
    """A path of the file, absolute: `~` expanded, relative to `base`. None when the user has no home folder."""
    try:
        return (base / Path(text).expanduser()).absolute()
    except RuntimeError:
        return None
