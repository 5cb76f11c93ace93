"""Paths in the settings file start at its folder."""

from __future__ import annotations

from pathlib import Path


def resolve(text: str, base: Path) -> Path | None:
    """A path of the file, absolute: `~` expanded, relative to `base`. None when the user has no home folder."""
    try:
        return (base / Path(text).expanduser()).absolute()
    except RuntimeError:
        return None
