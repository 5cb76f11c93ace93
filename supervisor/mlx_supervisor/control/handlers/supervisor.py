"""The supervisor: version, state, shutdown."""

import os
from typing import Any

from mlx_supervisor import __version__
from mlx_supervisor.control.dispatcher import Dispatcher


async def get_api_version(dispatcher: Dispatcher) -> str:
    """The version of Supervisord's interface."""
    return "3.0"


async def get_version(dispatcher: Dispatcher) -> str:
    """The version of mlx-supervisor."""
    return __version__


async def get_identification(dispatcher: Dispatcher) -> str:
    """Always mlx-supervisor."""
    return "mlx-supervisor"


async def get_state(dispatcher: Dispatcher) -> dict[str, Any]:
    """The supervisor's state: statecode and statename, RUNNING or SHUTDOWN."""
    if dispatcher.backend.shutting_down:
        return {"statecode": -1, "statename": "SHUTDOWN"}
    return {"statecode": 1, "statename": "RUNNING"}


async def get_pid(dispatcher: Dispatcher) -> int:
    """The supervisor's process id."""
    return os.getpid()


async def shutdown(dispatcher: Dispatcher) -> bool:
    """Checkpoint and stop all runs, then the supervisor. Returns at once."""
    dispatcher.backend.shutdown()
    return True


async def restart(dispatcher: Dispatcher) -> bool:
    """Shut down, then start the supervisor again. Returns at once."""
    dispatcher.backend.shutdown(restart=True)
    return True


async def send_event(dispatcher: Dispatcher, kind: str, data: str) -> bool:
    """Accepted and ignored: the supervisor has no event listeners."""
    return True
