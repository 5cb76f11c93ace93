"""Methods that Supervisord does not have."""

from typing import Any

from mlx_supervisor.control.backend import FaultCode
from mlx_supervisor.control.dispatcher import Dispatcher
from mlx_supervisor.control.handlers.processes import KNOWN_FOR_START
from mlx_supervisor.control.handlers.shared import find, in_order, narrowed


async def run_info(dispatcher: Dispatcher, name: str) -> dict[str, Any]:
    """Progress and memory of one run."""
    info = find(dispatcher.backend, name)
    return {"name": info.name, "statename": info.state.name, **dispatcher.backend.run_info(info.name)}


async def all_run_info(dispatcher: Dispatcher) -> list[Any]:
    """Progress and memory of all runs, sorted by name."""
    return [await run_info(dispatcher, info.name) for info in in_order(dispatcher.backend)]


async def restart_run(dispatcher: Dispatcher, name: str) -> bool:
    """Stop and start a run in one call; wait until it is ready."""
    restarting = dispatcher.backend.restart(find(dispatcher.backend, name).name)
    await narrowed(restarting, KNOWN_FOR_START, FaultCode.SPAWN_ERROR)
    return True
