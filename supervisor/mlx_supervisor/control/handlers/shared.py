"""Used by several modules of handlers: finding runs, narrowing faults, one result for each run."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import structlog

from mlx_supervisor.control import structs
from mlx_supervisor.control.backend import Backend, Fault, FaultCode, ProcessInfo
from mlx_supervisor.control.dispatcher import fault_of, show

_log = structlog.get_logger("control")


def find(backend: Backend, name: str) -> ProcessInfo:
    """The run named NAME, NAME:NAME or NAME:*. Raises Fault BAD_NAME."""
    group, colon, process = name.partition(":")
    if not colon or process in ("", "*", group):
        for info in backend.processes():
            if info.name == group:
                return info
    raise Fault(FaultCode.BAD_NAME, show(name))


def in_order(backend: Backend) -> list[ProcessInfo]:
    """All runs, sorted by name."""
    return sorted(backend.processes(), key=lambda info: info.name)


async def narrowed(action: Awaitable[None], known: frozenset[int], otherwise: FaultCode) -> None:
    """Await the action. A fault that is not `known` to Supervisord's client, or a bug, is raised as `otherwise`."""
    try:
        await action
    except Fault as fault:
        if fault.code in known:
            raise
        raise Fault(otherwise, fault.text) from fault
    except Exception as error:
        _log.exception("control_call_failed")
        raise fault_of(error, otherwise) from error


async def each(names: Iterable[str], action: Callable[[str], Awaitable[object]]) -> list[Any]:
    """Run the action for all names concurrently. Returns one result struct for each, sorted by name."""

    async def one(name: str) -> dict[str, Any]:
        try:
            await action(name)
        except Fault as fault:
            return structs.result(name, fault.code, str(fault))
        return structs.result(name)

    return list(await asyncio.gather(*(one(name) for name in sorted(names))))
