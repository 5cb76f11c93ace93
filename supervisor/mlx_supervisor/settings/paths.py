"""Paths in the settings file start at its folder."""

from __future__ import annotations

from pathlib import Path


def resolve(text: str, base: Path) -> Path | None:
    """A path of the file: `~` expanded, relative to the file's folder. None when there is no such home."""
    try:
        return (base / Path(text).expanduser()).absolute()
    except RuntimeError:
        return None
