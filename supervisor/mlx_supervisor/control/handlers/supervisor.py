"""The supervisor: its version, its state, its end."""

import os
from typing import Any

from mlx_supervisor import __version__
from mlx_supervisor.control.dispatcher import Dispatcher

API_VERSION = "3.0"
IDENTIFICATION = "mlx-supervisor"


async def get_api_version(dispatcher: Dispatcher) -> str:
    """The version of Supervisord's interface."""
    return API_VERSION


async def get_version(dispatcher: Dispatcher) -> str:
    """The version of mlx-supervisor."""
    return __version__


async def get_identification(dispatcher: Dispatcher) -> str:
    """A fixed name."""
    return IDENTIFICATION


async def get_state(dispatcher: Dispatcher) -> dict[str, Any]:
    """RUNNING or SHUTDOWN, with Supervisord's number."""
    if dispatcher.backend.shutting_down:
        return {"statecode": -1, "statename": "SHUTDOWN"}
    return {"statecode": 1, "statename": "RUNNING"}


async def get_pid(dispatcher: Dispatcher) -> int:
    """The supervisor's process id."""
    return os.getpid()


async def shutdown(dispatcher: Dispatcher) -> bool:
    """Begin to shut down."""
    dispatcher.backend.shutdown()
    return True


async def restart(dispatcher: Dispatcher) -> bool:
    """Begin to shut down and start again."""
    dispatcher.backend.shutdown(restart=True)
    return True


async def send_event(dispatcher: Dispatcher, kind: str, data: str) -> bool:
    """Accepted and ignored: the supervisor has no event listeners. Supervisord returns True in that case, too."""
    return True
