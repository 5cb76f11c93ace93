"""The command lines. Libraries that are slow to import are used only in here."""

from pathlib import Path

DEFAULT_FILE = Path("~/.config/mlx-supervisor/settings.toml")
"""The settings file of `serve` and `supervisorctl` when none is given."""
