"""What a method is, and how a call is looked up, checked and run.

A name from the wire is a key of one table and nothing else: it never becomes an attribute.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import structlog

from mlx_supervisor.control.backend import Fault, FaultCode, Target
from mlx_supervisor.control.xmlrpc_codec import clean

MULTICALL_LIMIT = 64
SHOWN_LIMIT = 120
"""Characters of a caller's own value that go back to it in a fault."""
_log = structlog.get_logger("control")

Handler = Callable[..., Awaitable[object]]


@dataclass(frozen=True, slots=True)
class Param:
    """A parameter. `kind`: string, int, boolean, array or signal (a name or a number). `default` None: required."""

    name: str
    kind: str
    default: Any = None


@dataclass(frozen=True, slots=True)
class Method:
    """A method of the table. `at_shutdown`: the fault once the daemon shuts down; None for what is still answered."""

    name: str
    returns: str
    help: str
    handler: Handler
    params: tuple[Param, ...] = ()
    at_shutdown: FaultCode | None = None

    def signature(self) -> list[str]:
        """The types of the result and of the parameters, as `system.methodSignature` has them."""
        return [self.returns, *("string" if param.kind == "signal" else param.kind for param in self.params)]


def bind(method: Method, arguments: tuple[Any, ...]) -> list[Any]:
    """The arguments, checked and completed with defaults. Raises Fault INCORRECT_PARAMETERS."""
    required = sum(param.default is None for param in method.params)
    if not required <= len(arguments) <= len(method.params):
        wanted = str(required) if required == len(method.params) else f"{required} to {len(method.params)}"
        raise Fault(FaultCode.INCORRECT_PARAMETERS, f"{method.name} takes {wanted} parameters, not {len(arguments)}")
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
    if isinstance(value, str) and len(value) <= 11:  # some clients have no integers of their own
        try:
            return int(value)
        except ValueError:
            return None
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _boolean(value: Any) -> bool | None:
    return bool(value) if isinstance(value, int) else None


def _signal(value: Any) -> str | int | None:
    return value if isinstance(value, str) else _whole(value)


_CHECKS: dict[str, Callable[[Any], Any]] = {
    "string": lambda value: value if isinstance(value, str) else None,
    "int": _whole,
    "boolean": _boolean,
    "array": lambda value: value if isinstance(value, list) else None,
    "signal": _signal,
}


def show(value: object) -> str:
    """A caller's value, short enough to be sent back."""
    text = clean(value if isinstance(value, str) else repr(value))
    return text if len(text) <= SHOWN_LIMIT else text[:SHOWN_LIMIT] + "…"


class Dispatcher:
    """Looks a call up in the table, checks it and runs it. Whatever goes wrong comes out as a Fault."""

    def __init__(self, target: Target, methods: list[Method]) -> None:
        self._target = target
        self._methods = {method.name: method for method in methods + self._system()}
        assert len(self._methods) == len(methods) + 4, "a name occurs twice"

    async def call(self, name: str, arguments: tuple[Any, ...]) -> object:
        """The result of a call. Raises Fault and nothing else."""
        method = self._methods.get(name)
        if method is None:
            raise Fault(FaultCode.UNKNOWN_METHOD, show(name))
        values = bind(method, arguments)
        if method.at_shutdown is not None and self._target.shutting_down:
            raise Fault(method.at_shutdown, "the supervisor is shutting down")
        try:
            return await method.handler(*values)
        except Fault:
            raise
        except Exception as error:
            _log.exception("control_call_failed", method=name)
            raise Fault(FaultCode.FAILED, f"{type(error).__name__}: {error}"[:1000]) from error

    def _system(self) -> list[Method]:
        name = Param("name", "string")
        return [
            Method("system.listMethods", "array", "The names of all methods.", self._list),
            Method("system.methodHelp", "string", "What a method does.", self._help, (name,)),
            Method("system.methodSignature", "array", "Types of result and parameters.", self._signature, (name,)),
            Method(
                "system.multicall",
                "array",
                f"Up to {MULTICALL_LIMIT} calls, one after the other; a fault comes as a struct in its place.",
                self._multicall,
                (Param("calls", "array"),),
            ),
        ]

    async def _list(self) -> list[str]:
        return sorted(self._methods)

    def _known(self, name: str) -> Method:
        method = self._methods.get(name)
        if method is None:
            raise Fault(FaultCode.SIGNATURE_UNSUPPORTED, show(name))
        return method

    async def _help(self, name: str) -> str:
        method = self._known(name)
        params = ", ".join(f"{param.name}: {param.kind}" for param in method.params)
        return f"{method.name}({params}) -> {method.returns}\n\n{method.help}"

    async def _signature(self, name: str) -> list[str]:
        return self._known(name).signature()

    async def _multicall(self, calls: list[Any]) -> list[object]:
        if len(calls) > MULTICALL_LIMIT:
            raise Fault(FaultCode.BAD_ARGUMENTS, f"{len(calls)} calls, at most {MULTICALL_LIMIT} are taken at once")
        results = []
        for call in calls:
            try:
                results.append(await self._one_of_many(call))
            except Fault as fault:
                results.append({"faultCode": int(fault.code), "faultString": str(fault)})
        return results

    async def _one_of_many(self, call: Any) -> object:
        name = call.get("methodName") if isinstance(call, dict) else None
        params = call.get("params", []) if isinstance(call, dict) else None
        if not isinstance(name, str) or not isinstance(params, list):
            raise Fault(FaultCode.INCORRECT_PARAMETERS, "a call is {methodName: string, params: array}")
        if name == "system.multicall":
            raise Fault(FaultCode.INCORRECT_PARAMETERS, "no system.multicall inside of one")
        return await self.call(name, tuple(params))
