"""The methods about methods (`system.*`), and several calls in one."""

from typing import Any

from mlx_supervisor.control.backend import Fault, FaultCode
from mlx_supervisor.control.dispatcher import Dispatcher, Method, show

MULTICALL_LIMIT = 64


async def list_methods(dispatcher: Dispatcher) -> list[str]:
    """The names of all methods."""
    return sorted(dispatcher.methods)


async def method_help(dispatcher: Dispatcher, name: str) -> str:
    """Parameters, result and help of a method."""
    method = _known(dispatcher, name)
    params = ", ".join(f"{param.name}: {param.kind}" for param in method.params)
    return f"{method.name}({params}) -> {method.returns}\n\n{method.help}"


async def method_signature(dispatcher: Dispatcher, name: str) -> list[str]:
    """The types of the result and of the parameters."""
    return _known(dispatcher, name).signature()


def _known(dispatcher: Dispatcher, name: str) -> Method:
    method = dispatcher.methods.get(name)
    if method is None:
        raise Fault(FaultCode.SIGNATURE_UNSUPPORTED, show(name))
    return method


async def multicall(dispatcher: Dispatcher, calls: list[Any]) -> list[object]:
    """The results of several calls, in order; a fault is a struct in its place."""
    if len(calls) > MULTICALL_LIMIT:
        raise Fault(FaultCode.BAD_ARGUMENTS, f"{len(calls)} calls, at most {MULTICALL_LIMIT} are taken at once")
    results = []
    for call in calls:
        try:
            results.append(await _one_of_many(dispatcher, call))
        except Fault as fault:
            results.append({"faultCode": int(fault.code), "faultString": str(fault)})
    return results


async def _one_of_many(dispatcher: Dispatcher, call: Any) -> object:
    name = call.get("methodName") if isinstance(call, dict) else None
    params = call.get("params", []) if isinstance(call, dict) else None
    if not isinstance(name, str) or not isinstance(params, list):
        raise Fault(FaultCode.INCORRECT_PARAMETERS, "a call is {methodName: string, params: array}")
    if name == "system.multicall":
        raise Fault(FaultCode.INCORRECT_PARAMETERS, "no system.multicall inside of one")
    return await dispatcher.call(name, tuple(params))
