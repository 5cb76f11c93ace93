"""A run without a settings file: mlx_lm's configuration file, options of the command line, or both.

The YAML is not parsed here: the worker does that. So a daemon needs no YAML library.
"""

import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_supervisor.settings.rules import NAME_LENGTH, RESERVED_NAMES
from mlx_supervisor.settings.schema import RunSettings, TaskSettings

SUFFIXES = frozenset({".yaml", ".yml"})
SETTINGS_SUFFIX = ".toml"
UNNAMED = "run"
"""The run's name where no file gives one."""


def is_configuration(path: Path) -> bool:
    """Whether a file is mlx_lm's configuration, by its name."""
    return path.suffix.lower() in SUFFIXES


def names_run(path: Path) -> bool:
    """Whether a file is a settings file or mlx_lm's configuration, by its name."""
    return path.suffix.lower() == SETTINGS_SUFFIX or is_configuration(path)


def option(key: str) -> str:
    """A key of mlx_lm.lora as its option: `--batch-size`."""
    return f"--{key.replace('_', '-')}"


def run_of(configuration: Path | None, options: Mapping[str, Any]) -> RunSettings:
    """The settings of such a run: the defaults."""
    config = None if configuration is None else str(configuration)
    return RunSettings(task=TaskSettings(kind="mlx_lm", config=config, options=dict(options)))


def name_of(configuration: Path | None, options: Mapping[str, Any], base: Path) -> str:
    """The run's name: the file's without its suffix; then, if typed, the adapters' folder.

    Users of mlx_lm tell runs apart by `--adapter-path`: another folder is another run, never the same one resumed.
    """
    parts = [UNNAMED if configuration is None else configuration.stem]
    if "adapter_path" in options:
        folder = Path(str(options["adapter_path"]))
        parts.append(str(folder.relative_to(base) if folder.is_relative_to(base) else folder).lstrip("/"))
    return valid_name("-".join(parts))


def valid_name(text: str) -> str:
    """A text as a valid name of a run; a long one is cut, and told apart from others by a checksum."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", text).lstrip("._-").rstrip("-")
    if len(name) > NAME_LENGTH:
        name = f"{name[: NAME_LENGTH - 9]}-{zlib.crc32(text.encode()):08x}"
    return UNNAMED if not name or name.lower() in RESERVED_NAMES else name
