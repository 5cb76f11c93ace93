"""The control plane: Supervisord's XML-RPC interface and `training.*`, over a Unix socket of the owner's."""

from mlx_supervisor.control.backend import (
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
from mlx_supervisor.control.server import ControlServer
from mlx_supervisor.control.unix_socket import SocketFileError

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
