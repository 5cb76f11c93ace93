"""Runs as Supervisord's processes: state, start, stop, signals."""

import signal as signals
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from mlx_supervisor.control import structs
from mlx_supervisor.control.backend import (
    SIGNALLABLE_STATES,
    STARTED_STATES,
    Fault,
    FaultCode,
    ProcessInfo,
    ProcessState,
)
from mlx_supervisor.control.dispatcher import Dispatcher, show
from mlx_supervisor.control.handlers.shared import each, find, in_order, narrowed

KNOWN_FOR_START = frozenset({10, 20, 21, 40, 50, 60})
KNOWN_FOR_STOP = frozenset({10, 11, 30, 70})
"""Fault codes that Supervisord's client expects; any other from these methods ends it with a traceback."""


@dataclass(frozen=True, slots=True)
class _Verb:
    """What a client can do to a run: the states that allow it, and the fault in all others."""

    states: frozenset[ProcessState]
    refusal: FaultCode


_START = _Verb(frozenset(ProcessState) - STARTED_STATES, FaultCode.ALREADY_STARTED)
_STOP = _Verb(STARTED_STATES, FaultCode.NOT_RUNNING)
_SIGNAL = _Verb(SIGNALLABLE_STATES, FaultCode.NOT_RUNNING)
_Action = Callable[[str], Awaitable[object]]


async def _on_one(info: ProcessInfo, name: str, verb: _Verb, action: _Action) -> object:
    """`name` is the client's: NAME: and NAME:* are groups and return an array."""
    if name != info.name and name.endswith((":", ":*")):
        return await _on_each([info], verb, action)
    if info.state not in verb.states:
        raise Fault(verb.refusal, info.name)
    return await action(info.name)


async def _on_each(infos: Iterable[ProcessInfo], verb: _Verb, action: _Action) -> list[Any]:
    return await each([info.name for info in infos if info.state in verb.states], action)


async def process_info(dispatcher: Dispatcher, name: str) -> dict[str, Any]:
    """The state of one run."""
    return structs.process(dispatcher.backend, find(dispatcher.backend, name), time.time())


async def all_process_info(dispatcher: Dispatcher) -> list[Any]:
    """The states of all runs, sorted by name."""
    return [structs.process(dispatcher.backend, info, time.time()) for info in in_order(dispatcher.backend)]


async def start(dispatcher: Dispatcher, name: str, wait: bool) -> object:
    """Start a run; by default wait until it is ready. NAME:* starts its group."""
    return await _on_one(find(dispatcher.backend, name), name, _START, partial(_start, dispatcher, wait))


async def start_group(dispatcher: Dispatcher, name: str, wait: bool) -> list[Any]:
    """Start the runs of a group that are not started; by default wait until they are ready."""
    return await _on_each([find(dispatcher.backend, name)], _START, partial(_start, dispatcher, wait))


async def start_all(dispatcher: Dispatcher, wait: bool) -> list[Any]:
    """Start all runs that are not started; by default wait until they are ready."""
    return await _on_each(dispatcher.backend.processes(), _START, partial(_start, dispatcher, wait))


async def _start(dispatcher: Dispatcher, wait: bool, name: str) -> bool:
    await narrowed(dispatcher.backend.start(name, wait), KNOWN_FOR_START, FaultCode.SPAWN_ERROR)
    return True


async def stop(dispatcher: Dispatcher, name: str, wait: bool) -> object:
    """Checkpoint and stop a run; by default wait until it has ended. NAME:* stops its group."""
    return await _on_one(find(dispatcher.backend, name), name, _STOP, partial(_stop, dispatcher, wait))


async def stop_group(dispatcher: Dispatcher, name: str, wait: bool) -> list[Any]:
    """Checkpoint and stop the started runs of a group; by default wait until they have ended."""
    return await _on_each([find(dispatcher.backend, name)], _STOP, partial(_stop, dispatcher, wait))


async def stop_all(dispatcher: Dispatcher, wait: bool) -> list[Any]:
    """Checkpoint and stop all started runs; by default wait until they have ended."""
    return await _on_each(dispatcher.backend.processes(), _STOP, partial(_stop, dispatcher, wait))


async def _stop(dispatcher: Dispatcher, wait: bool, name: str) -> bool:
    await narrowed(dispatcher.backend.stop(name, wait), KNOWN_FOR_STOP, FaultCode.FAILED)
    return True


async def signal(dispatcher: Dispatcher, name: str, requested: str | int) -> object:
    """Send a signal (name or number) to the worker of a run. NAME:* signals its group."""
    info = find(dispatcher.backend, name)
    return await _on_one(info, name, _SIGNAL, partial(_signal, dispatcher, _signal_number(requested)))


async def signal_group(dispatcher: Dispatcher, name: str, requested: str | int) -> list[Any]:
    """Send a signal (name or number) to the workers of a group."""
    info = find(dispatcher.backend, name)
    return await _on_each([info], _SIGNAL, partial(_signal, dispatcher, _signal_number(requested)))


async def signal_all(dispatcher: Dispatcher, requested: str | int) -> list[Any]:
    """Send a signal (name or number) to the workers of all runs."""
    action = partial(_signal, dispatcher, _signal_number(requested))
    return await _on_each(dispatcher.backend.processes(), _SIGNAL, action)


async def _signal(dispatcher: Dispatcher, number: int, name: str) -> bool:
    async def send() -> None:
        dispatcher.backend.signal(name, number)

    await narrowed(send(), KNOWN_FOR_STOP, FaultCode.FAILED)
    return True


def _signal_number(requested: str | int) -> int:
    """The number of a signal given as 15, "15", "TERM" or "SIGTERM". Raises Fault BAD_SIGNAL."""
    text = str(requested).strip().upper()
    try:
        if text.isascii() and text.isdigit():
            return signals.Signals(int(text[:4])).value
        return signals.Signals[text if text.startswith("SIG") else f"SIG{text}"].value
    except (KeyError, ValueError):
        raise Fault(FaultCode.BAD_SIGNAL, show(str(requested))) from None


async def send_stdin(dispatcher: Dispatcher, name: str, chars: str) -> bool:
    """Always a fault: a training run has no standard input."""
    info = find(dispatcher.backend, name)
    if info.state not in SIGNALLABLE_STATES:
        raise Fault(FaultCode.NOT_RUNNING, info.name)
    raise Fault(FaultCode.NO_FILE, f"{info.name}: a training run has no standard input")
