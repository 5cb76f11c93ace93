"""The command lines. What is slow to import stays in here."""

from pathlib import Path

DEFAULT_FILE = Path("~/.config/mlx-supervisor/settings.toml")
"""The settings that `serve`, and with it `supervisorctl`, goes by when no file is named."""
