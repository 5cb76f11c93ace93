"""The methods about methods (`system.*`), and several calls in one."""

from typing import Any

from mlx_supervisor.control.backend import Fault, FaultCode
from mlx_supervisor.control.dispatcher import Dispatcher, Method, show

MULTICALL_LIMIT = 64


async def list_methods(dispatcher: Dispatcher) -> list[str]:
    """The names of all methods."""
    return sorted(dispatcher.methods)


async def method_help(dispatcher: Dispatcher, name: str) -> str:
    """The parameters, the result and the purpose of a method."""
    method = _known(dispatcher, name)
    params = ", ".join(f"{param.name}: {param.kind}" for param in method.params)
    return f"{method.name}({params}) -> {method.returns}\n\n{method.handler.__doc__}"


async def method_signature(dispatcher: Dispatcher, name: str) -> list[str]:
    """The types of a method's result and parameters."""
    return _known(dispatcher, name).signature()


def _known(dispatcher: Dispatcher, name: str) -> Method:
    method = dispatcher.methods.get(name)
    if method is None:
        raise Fault(FaultCode.SIGNATURE_UNSUPPORTED, show(name))
    return method


async def multicall(dispatcher: Dispatcher, calls: list[Any]) -> list[object]:
    """Up to 64 calls, one after the other. Returns their results; that of a failed call is a struct with its fault."""
    if len(calls) > MULTICALL_LIMIT:
        raise Fault(FaultCode.BAD_ARGUMENTS, f"{len(calls)} calls, at most {MULTICALL_LIMIT} are allowed in one")
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
        raise Fault(FaultCode.INCORRECT_PARAMETERS, "a system.multicall cannot contain another")
    return await dispatcher.call(name, tuple(params))
