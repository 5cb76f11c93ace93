"""The handlers of `supervisor.*` (API version 3.0) and `training.*`: from Supervisord's words to the target's."""

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any

import structlog

from mlx_supervisor import __version__
from mlx_supervisor.control import log_reader, structs
from mlx_supervisor.control.backend import (
    SIGNALLABLE_STATES,
    STARTED_STATES,
    Channel,
    Fault,
    FaultCode,
    ProcessInfo,
    Target,
)
from mlx_supervisor.control.dispatcher import show

API_VERSION = "3.0"
IDENTIFICATION = "mlx-supervisor"
_log = structlog.get_logger("control")

_UNDERSTOOD_OF_START = {10, 20, 21, 40, 50, 60}
_UNDERSTOOD_OF_STOP = {10, 11, 30, 70}
"""Supervisord's client ends in a traceback on any other fault of these calls."""


class Interface:
    """The handlers. One instance serves all connections."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._background: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """Cancel the starts and stops that nobody waits for."""
        tasks = list(self._background)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def find(self, name: str) -> ProcessInfo:
        """The run that a client means by NAME, NAME:NAME or NAME:*. Raises Fault BAD_NAME."""
        group, colon, process = name.partition(":")
        if not colon or process in ("", "*", group):
            for info in self._target.processes():
                if info.name == group:
                    return info
        raise Fault(FaultCode.BAD_NAME, show(name))

    # about the daemon

    async def get_version(self) -> str:
        return API_VERSION

    async def get_supervisor_version(self) -> str:
        return __version__

    async def get_identification(self) -> str:
        return IDENTIFICATION

    async def get_state(self) -> dict[str, Any]:
        if self._target.shutting_down:
            return {"statecode": -1, "statename": "SHUTDOWN"}
        return {"statecode": 1, "statename": "RUNNING"}

    async def get_pid(self) -> int:
        return os.getpid()

    async def read_log(self, offset: int, length: int) -> str:
        return log_reader.read(self._target.main_log_path(), offset, length)

    async def clear_log(self) -> bool:
        self._target.clear_main_log()
        return True

    async def shutdown(self) -> bool:
        self._target.shutdown()
        return True

    async def restart(self) -> bool:
        self._target.shutdown(restart=True)
        return True

    async def reload_config(self) -> list[Any]:
        changes = self._target.reload_config()
        return [[list(changes.added), list(changes.changed), list(changes.removed)]]

    async def add_group(self, name: str) -> bool:
        await self._target.add(name)
        return True

    async def remove_group(self, name: str) -> bool:
        await self._target.remove(self.find(name).name)
        return True

    async def config_info(self) -> list[Any]:
        infos = sorted(self._target.configs(), key=lambda info: info.name)
        return [structs.config(self._target, info) for info in infos]

    # about runs

    async def process_info(self, name: str) -> dict[str, Any]:
        return structs.process(self._target, self.find(name), time.time())

    async def all_process_info(self) -> list[Any]:
        infos = sorted(self._target.processes(), key=lambda info: info.name)
        return [structs.process(self._target, info, time.time()) for info in infos]

    async def start(self, name: str, wait: bool) -> object:
        info = self.find(name)
        if name != info.name and name.endswith((":", ":*")):
            return await self.start_group(info.name, wait)
        if info.state in STARTED_STATES:
            raise Fault(FaultCode.ALREADY_STARTED, info.name)
        return await self._begin(self._start, info.name, wait)

    async def start_group(self, name: str, wait: bool) -> list[Any]:
        return await self._start_each([self.find(name)], wait)

    async def start_all(self, wait: bool) -> list[Any]:
        return await self._start_each(self._target.processes(), wait)

    async def _start_each(self, infos: Iterable[ProcessInfo], wait: bool) -> list[Any]:
        names = [info.name for info in infos if info.state not in STARTED_STATES]
        return await _each(names, lambda name: self._begin(self._start, name, wait))

    async def _start(self, name: str) -> None:
        await _narrowed(self._target.start(name), _UNDERSTOOD_OF_START, FaultCode.SPAWN_ERROR)

    async def stop(self, name: str, wait: bool) -> object:
        info = self.find(name)
        if name != info.name and name.endswith((":", ":*")):
            return await self.stop_group(info.name, wait)
        if info.state not in STARTED_STATES:
            raise Fault(FaultCode.NOT_RUNNING, info.name)
        return await self._begin(self._stop, info.name, wait)

    async def stop_group(self, name: str, wait: bool) -> list[Any]:
        return await self._stop_each([self.find(name)], wait)

    async def stop_all(self, wait: bool) -> list[Any]:
        return await self._stop_each(self._target.processes(), wait)

    async def _stop_each(self, infos: Iterable[ProcessInfo], wait: bool) -> list[Any]:
        names = [info.name for info in infos if info.state in STARTED_STATES]
        return await _each(names, lambda name: self._begin(self._stop, name, wait))

    async def _stop(self, name: str) -> None:
        await _narrowed(self._target.stop(name), _UNDERSTOOD_OF_STOP, FaultCode.FAILED)

    async def _begin(self, action: Callable[[str], Awaitable[None]], name: str, wait: bool) -> bool:
        if wait:
            await action(name)
            return True
        task = asyncio.create_task(_unwatched(action, name))
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return True

    async def signal(self, name: str, wanted: str | int) -> object:
        info, number = self.find(name), _signal_number(wanted)
        if name != info.name and name.endswith((":", ":*")):
            return await self._signal_each([info], number)
        if info.state not in SIGNALLABLE_STATES:
            raise Fault(FaultCode.NOT_RUNNING, info.name)
        return await self._signal(info.name, number)

    async def signal_group(self, name: str, wanted: str | int) -> list[Any]:
        return await self._signal_each([self.find(name)], _signal_number(wanted))

    async def signal_all(self, wanted: str | int) -> list[Any]:
        return await self._signal_each(self._target.processes(), _signal_number(wanted))

    async def _signal_each(self, infos: Iterable[ProcessInfo], number: int) -> list[Any]:
        names = [info.name for info in infos if info.state in SIGNALLABLE_STATES]
        return await _each(names, lambda name: self._signal(name, number))

    async def _signal(self, name: str, number: int) -> bool:
        async def send() -> None:
            self._target.signal(name, number)

        await _narrowed(send(), _UNDERSTOOD_OF_STOP, FaultCode.FAILED)
        return True

    async def send_stdin(self, name: str, chars: str) -> bool:
        info = self.find(name)
        if info.state not in SIGNALLABLE_STATES:
            raise Fault(FaultCode.NOT_RUNNING, info.name)
        raise Fault(FaultCode.NO_FILE, f"{info.name}: a training run has no standard input")

    async def send_event(self, kind: str, data: str) -> bool:
        return True  # there are no event listeners here, and Supervisord does not say how many heard it either

    # logs

    def log(self, name: str, channel: Channel) -> Path:
        """The log to follow. Raises Fault BAD_NAME, NO_FILE."""
        return _must_exist(self._target.log_path(self.find(name).name, channel), f"{show(name)} has no {channel} log")

    def main_log(self) -> Path:
        """The daemon's log to follow. Raises Fault NO_FILE."""
        return _must_exist(self._target.main_log_path(), "the supervisor writes no log")

    def log_reader(self, channel: Channel) -> Callable[..., Awaitable[object]]:
        """A handler that reads one channel's log of a run."""

        async def read(name: str, offset: int, length: int) -> str:
            return log_reader.read(self._target.log_path(self.find(name).name, channel), offset, length)

        return read

    def log_tailer(self, channel: Channel) -> Callable[..., Awaitable[object]]:
        """A handler that goes on reading one channel's log of a run."""

        async def tail(name: str, offset: int, length: int) -> list[Any]:
            return list(log_reader.tail(self._target.log_path(self.find(name).name, channel), offset, length))

        return tail

    async def clear_process_logs(self, name: str) -> bool:
        self._target.clear_logs(self.find(name).name)
        return True

    async def clear_all_process_logs(self) -> list[Any]:
        return await _each([info.name for info in self._target.processes()], self.clear_process_logs)

    # what Supervisord cannot say

    async def run_info(self, name: str) -> dict[str, Any]:
        info = self.find(name)
        return {"name": info.name, "statename": info.state.name, **self._target.run_info(info.name)}

    async def all_run_info(self) -> list[Any]:
        return [await self.run_info(info.name) for info in sorted(self._target.processes(), key=lambda info: info.name)]

    async def restart_run(self, name: str) -> bool:
        await _narrowed(self._target.restart(self.find(name).name), _UNDERSTOOD_OF_START, FaultCode.SPAWN_ERROR)
        return True


def _must_exist(path: Path | None, otherwise: str) -> Path:
    if path is None:
        raise Fault(FaultCode.NO_FILE, otherwise)
    return path


async def _narrowed(action: Awaitable[None], understood: set[int], otherwise: FaultCode) -> None:
    try:
        await action
    except Fault as fault:
        if fault.code in understood:
            raise
        raise Fault(otherwise, fault.text) from fault
    except Exception as error:
        _log.exception("control_call_failed")
        raise Fault(otherwise, f"{type(error).__name__}: {error}"[:1000]) from error


async def _each(names: list[str], action: Callable[[str], Awaitable[object]]) -> list[Any]:
    async def one(name: str) -> dict[str, Any]:
        try:
            await action(name)
        except Fault as fault:
            return structs.result(name, fault.code, str(fault))
        return structs.result(name)

    return list(await asyncio.gather(*(one(name) for name in sorted(names))))


async def _unwatched(action: Callable[[str], Awaitable[None]], name: str) -> None:
    try:
        await action(name)
    except Fault as fault:
        _log.warning("control_background_call_failed", run=name, fault=str(fault))


def _signal_number(wanted: str | int) -> int:
    """The number of a signal given as 15, "15", "TERM" or "SIGTERM". Raises Fault BAD_SIGNAL."""
    text = str(wanted).strip().upper()
    try:
        if text.isascii() and text.isdigit():
            return signal.Signals(int(text[:4])).value
        return signal.Signals[text if text.startswith("SIG") else f"SIG{text}"].value
    except (KeyError, ValueError):
        raise Fault(FaultCode.BAD_SIGNAL, show(str(wanted))) from None
