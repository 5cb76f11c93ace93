"""The number of objects in a machine."""

from collections.abc import Iterable, Mapping

_PLAIN = (str, int, float, bool, type, type(None))


def weight(thing: object) -> int:
    """Elements of `thing`'s attributes and their containers, and of objects of the supervisor's classes in them."""
    seen: set[int] = set()
    waiting: list[object] = [*vars(thing).values()]
    found = 0
    while waiting:
        one = waiting.pop()
        found += 1
        if isinstance(one, _PLAIN) or id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, Mapping):
            waiting += one.values()
        elif isinstance(one, Iterable):
            waiting += one
        elif type(one).__module__.startswith("mlx_supervisor"):
            waiting += getattr(one, "__dict__", {}).values()
            slots = [name for kind in type(one).__mro__ for name in getattr(kind, "__slots__", ())]
            waiting += [getattr(one, name, None) for name in slots]
    return found
