"""The settings: reading them again, and adding and removing runs."""

from typing import Any

from mlx_supervisor.control import structs
from mlx_supervisor.control.dispatcher import Dispatcher
from mlx_supervisor.control.handlers.shared import find


async def reload_config(dispatcher: Dispatcher) -> list[Any]:
    """Read the settings again without applying them: [[added, changed, removed]]."""
    changes = dispatcher.backend.reload_config()
    return [[list(changes.added), list(changes.changed), list(changes.removed)]]


async def config_info(dispatcher: Dispatcher) -> list[Any]:
    """The runs of the settings as last read, sorted by name, in use or not."""
    infos = sorted(dispatcher.backend.configs(), key=lambda info: info.name)
    return [structs.config(dispatcher.backend, info) for info in infos]


async def add_group(dispatcher: Dispatcher, name: str) -> bool:
    """Add a run of the settings as last read."""
    await dispatcher.backend.add(name)
    return True


async def remove_group(dispatcher: Dispatcher, name: str) -> bool:
    """Remove a stopped run."""
    await dispatcher.backend.remove(find(dispatcher.backend, name).name)
    return True
