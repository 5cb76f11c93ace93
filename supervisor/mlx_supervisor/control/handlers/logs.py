"""Logs: of runs and of the supervisor."""

from pathlib import Path
from typing import Any

from mlx_supervisor.control import log_reader
from mlx_supervisor.control.backend import Backend, Channel, Fault, FaultCode
from mlx_supervisor.control.dispatcher import Dispatcher, show
from mlx_supervisor.control.handlers.shared import each, find


def log_path(backend: Backend, name: str, channel: Channel) -> Path:
    """The file of a run's log, to follow. Raises Fault BAD_NAME, NO_FILE."""
    path = backend.log_path(find(backend, name).name, channel)
    if path is None:
        raise Fault(FaultCode.NO_FILE, f"{show(name)} has no {channel} log")
    return path


def main_log_path(backend: Backend) -> Path:
    """The file of the supervisor's log, to follow. Raises Fault NO_FILE."""
    path = backend.main_log_path()
    if path is None:
        raise Fault(FaultCode.NO_FILE, "the supervisor writes no log")
    return path


async def read_stdout(dispatcher: Dispatcher, name: str, offset: int, length: int) -> str:
    """`length` bytes of a run's standard output from `offset`, 0 for all; a negative offset reads its end."""
    return log_reader.read(_path(dispatcher, name, "stdout"), offset, length)


async def read_stderr(dispatcher: Dispatcher, name: str, offset: int, length: int) -> str:
    """`length` bytes of a run's standard error from `offset`, 0 for all; a negative offset reads its end."""
    return log_reader.read(_path(dispatcher, name, "stderr"), offset, length)


async def tail_stdout(dispatcher: Dispatcher, name: str, offset: int, length: int) -> list[Any]:
    """New text of a run's standard output: [text, next offset, whether text was skipped]."""
    return list(log_reader.tail(_path(dispatcher, name, "stdout"), offset, length))


async def tail_stderr(dispatcher: Dispatcher, name: str, offset: int, length: int) -> list[Any]:
    """New text of a run's standard error: [text, next offset, whether text was skipped]."""
    return list(log_reader.tail(_path(dispatcher, name, "stderr"), offset, length))


def _path(dispatcher: Dispatcher, name: str, channel: Channel) -> Path | None:
    return dispatcher.backend.log_path(find(dispatcher.backend, name).name, channel)


async def clear(dispatcher: Dispatcher, name: str) -> bool:
    """Empty both logs of a run."""
    dispatcher.backend.clear_logs(find(dispatcher.backend, name).name)
    return True


async def clear_all(dispatcher: Dispatcher) -> list[Any]:
    """Empty the logs of all runs."""
    return await each([info.name for info in dispatcher.backend.processes()], lambda name: clear(dispatcher, name))


async def read_main(dispatcher: Dispatcher, offset: int, length: int) -> str:
    """`length` bytes of the supervisor's log from `offset`, 0 for all; a negative offset reads its end."""
    return log_reader.read(dispatcher.backend.main_log_path(), offset, length)


async def clear_main(dispatcher: Dispatcher) -> bool:
    """Empty the supervisor's log."""
    dispatcher.backend.clear_main_log()
    return True
