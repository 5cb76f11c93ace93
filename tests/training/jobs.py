"""Jobs as the supervisor writes them: the settings' defaults, and changes to them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from mlx_supervisor import wire
from mlx_supervisor.core.actions import Spawn
from mlx_supervisor.settings.schema import CheckpointSettings, RunSettings, Settings, TaskSettings
from mlx_supervisor.settings.to_job import job_of

_TASK = RunSettings(task=TaskSettings(kind="python"), checkpoint=CheckpointSettings(every_seconds=0))
_SETTINGS = Settings(Path("/nowhere/runs.toml"), Path("/nowhere"), {"run": _TASK})
DEFAULTS = job_of(_SETTINGS, "run", Path("/nowhere/run"), None, Spawn(1, None, None), None)
"""Without any checkpoint but the last."""


def job(**fields: Any) -> wire.Job:
    """The default job with these fields; a mapping changes single fields of that part."""
    values = msgspec.to_builtins(DEFAULTS)
    for name, value in fields.items():
        values[name] = values[name] | value if isinstance(value, Mapping) else value
    return msgspec.convert(msgspec.to_builtins(values), wire.Job)


def memory_job(**changes: Any) -> wire.MemoryJob:
    return msgspec.structs.replace(DEFAULTS.memory, **changes)
