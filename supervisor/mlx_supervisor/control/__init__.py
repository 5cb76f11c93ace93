"""The control plane: Supervisord's XML-RPC interface and `training.*`, over a Unix socket of the owner's."""

from mlx_supervisor.control.server import ControlServer
from mlx_supervisor.control.socket_file import SocketFileError
from mlx_supervisor.control.target import (
    Channel,
    ConfigChanges,
    ConfigInfo,
    Fault,
    FaultCode,
    ProcessInfo,
    ProcessState,
    RunInfo,
    Target,
)

__all__ = [
    "Channel",
    "ConfigChanges",
    "ConfigInfo",
    "ControlServer",
    "Fault",
    "FaultCode",
    "ProcessInfo",
    "ProcessState",
    "RunInfo",
    "SocketFileError",
    "Target",
]
