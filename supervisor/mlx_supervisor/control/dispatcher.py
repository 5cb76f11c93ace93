"""Methods and their parameters; looking up, checking and running calls.

A method's name in a request is only ever a key of the table, never an attribute.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Concatenate

import structlog

from mlx_supervisor.control.backend import Backend, Fault, FaultCode
from mlx_supervisor.control.xmlrpc_codec import clean

SHOWN_LIMIT = 120
"""Characters of a value from a request that a fault shows."""
_log = structlog.get_logger("control")

Handler = Callable[Concatenate["Dispatcher", ...], Awaitable[object]]


@dataclass(frozen=True, slots=True)
class Param:
    """A parameter. `kind`: string, int, boolean, array or signal (a name or a number). `default` None: required."""

    name: str
    kind: str
    default: Any = None


@dataclass(frozen=True, slots=True)
class Method:
    """A method of the table; its help is the handler's docstring.

    `at_shutdown`: its fault while the daemon shuts down; None for a method that is still answered then.
    """

    name: str
    returns: str
    handler: Handler
    params: tuple[Param, ...] = ()
    at_shutdown: FaultCode | None = None

    def signature(self) -> list[str]:
        """The types of the result and of the parameters, for `system.methodSignature`."""
        return [self.returns, *("string" if param.kind == "signal" else param.kind for param in self.params)]


def bind(method: Method, arguments: tuple[Any, ...]) -> list[Any]:
    """The arguments, checked and completed with defaults. Raises Fault INCORRECT_PARAMETERS."""
    required = sum(param.default is None for param in method.params)
    if not required <= len(arguments) <= len(method.params):
        allowed = str(required) if required == len(method.params) else f"{required} to {len(method.params)}"
        raise Fault(FaultCode.INCORRECT_PARAMETERS, f"{method.name} takes {allowed} parameters, not {len(arguments)}")
    given = [_check(method, param, value) for param, value in zip(method.params, arguments, strict=False)]
    return given + [param.default for param in method.params[len(given) :]]


def _check(method: Method, param: Param, value: Any) -> Any:
    checked = _CHECKS[param.kind](value)
    if checked is None:
        raise Fault(
            FaultCode.INCORRECT_PARAMETERS,
            f"{method.name}: {param.name} must be of type {param.kind}, not {type(value).__name__}: {show(value)}",
        )
    return checked


def _whole(value: Any) -> int | None:
    if isinstance(value, str) and len(value) <= 11:  # some clients send integers as strings
        try:
            return int(value)
        except ValueError:
            return None
    return value if isinstance(value, int) and not isinstance(value, bool) else None


_CHECKS: dict[str, Callable[[Any], Any]] = {
    "string": lambda value: value if isinstance(value, str) else None,
    "int": _whole,
    "boolean": lambda value: bool(value) if isinstance(value, int) else None,
    "array": lambda value: value if isinstance(value, list) else None,
    "signal": lambda value: value if isinstance(value, str) else _whole(value),
}


def show(value: object) -> str:
    """A value from a request, shortened for a fault."""
    text = clean(value if isinstance(value, str) else repr(value))
    return text if len(text) <= SHOWN_LIMIT else text[:SHOWN_LIMIT] + "…"


def fault_of(error: Exception, code: FaultCode) -> Fault:
    """An unexpected exception as a fault."""
    return Fault(code, f"{type(error).__name__}: {error}"[:1000])


class Dispatcher:
    """Looks up, checks and runs calls. Handlers use its `backend` and `methods` (by name)."""

    def __init__(self, backend: Backend, methods: Sequence[Method]) -> None:
        self.backend = backend
        self.methods = {method.name: method for method in methods}
        assert len(self.methods) == len(methods), "a name occurs twice"

    async def call(self, name: str, arguments: tuple[Any, ...]) -> object:
        """The result of a call. Raises Fault and nothing else."""
        method = self.methods.get(name)
        if method is None:
            raise Fault(FaultCode.UNKNOWN_METHOD, show(name))
        values = bind(method, arguments)
        if method.at_shutdown is not None and self.backend.shutting_down:
            raise Fault(method.at_shutdown, "the supervisor is shutting down")
        try:
            return await method.handler(self, *values)
        except Fault:
            raise
        except Exception as error:
            _log.exception("control_call_failed", method=name)
            raise fault_of(error, FaultCode.FAILED) from error


async def cancel(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel the tasks and wait until they have ended."""
    waiting = list(tasks)
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
