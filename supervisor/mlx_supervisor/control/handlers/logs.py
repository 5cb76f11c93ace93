"""Logs: of runs and of the supervisor."""

from pathlib import Path
from typing import Any

from mlx_supervisor.control import log_reader
from mlx_supervisor.control.backend import Backend, Channel, Fault, FaultCode
from mlx_supervisor.control.dispatcher import Dispatcher, show
from mlx_supervisor.control.handlers.shared import each, find


def log_path(backend: Backend, name: str, channel: Channel) -> Path:
    """The log of a run to follow. Raises Fault BAD_NAME, NO_FILE."""
    path = backend.log_path(find(backend, name).name, channel)
    if path is None:
        raise Fault(FaultCode.NO_FILE, f"{show(name)} has no {channel} log")
    return path


def main_log_path(backend: Backend) -> Path:
    """The supervisor's log to follow. Raises Fault NO_FILE."""
    path = backend.main_log_path()
    if path is None:
        raise Fault(FaultCode.NO_FILE, "the supervisor writes no log")
    return path


async def read(dispatcher: Dispatcher, name: str, offset: int, length: int, channel: Channel) -> str:
    """A piece of a run's log."""
    path = dispatcher.backend.log_path(find(dispatcher.backend, name).name, channel)
    return log_reader.read(path, offset, length)


async def tail(dispatcher: Dispatcher, name: str, offset: int, length: int, channel: Channel) -> list[Any]:
    """Text, next offset, and whether text was skipped."""
    path = dispatcher.backend.log_path(find(dispatcher.backend, name).name, channel)
    return list(log_reader.tail(path, offset, length))


async def clear(dispatcher: Dispatcher, name: str) -> bool:
    """Empty both logs of a run."""
    dispatcher.backend.clear_logs(find(dispatcher.backend, name).name)
    return True


async def clear_all(dispatcher: Dispatcher) -> list[Any]:
    """Empty the logs of all runs."""
    return await each([info.name for info in dispatcher.backend.processes()], lambda name: clear(dispatcher, name))


async def read_main(dispatcher: Dispatcher, offset: int, length: int) -> str:
    """A piece of the supervisor's log."""
    return log_reader.read(dispatcher.backend.main_log_path(), offset, length)


async def clear_main(dispatcher: Dispatcher) -> bool:
    """Empty the supervisor's log."""
    dispatcher.backend.clear_main_log()
    return True
