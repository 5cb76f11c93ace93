"""What refers to an object: from referrer to referrer, up to one that has a name in the source code.

Every visited object lies in one list and is identified by its index there: any other container of this module would be
found as a referrer.
"""

import functools
import gc
import time
from collections import Counter, OrderedDict, defaultdict, deque
from dataclasses import dataclass
from types import (
    AsyncGeneratorType,
    BuiltinFunctionType,
    CellType,
    CoroutineType,
    FrameType,
    FunctionType,
    GeneratorType,
    ModuleType,
)
from typing import Any

from mlx_worker.autopsy import introspection

LEVELS_LIMIT = 10
CHAINS_LIMIT = 512
CONTAINERS_LIMIT = 4
"""Containers listed between an object and the name."""
_CONTAINERS = (list, dict, tuple, set, frozenset, deque, defaultdict, OrderedDict, Counter)
_DEAD_ENDS = (FunctionType, BuiltinFunctionType, ModuleType)
"""Referrers whose referrers lead nowhere: the caller of a function does not hold what the function refers to."""
_LRU_CACHE = type(functools.lru_cache(maxsize=1)(len))


@dataclass(frozen=True)
class Holder:
    """`text`: the name, with file and line. `through`: addresses of the object and everything between."""

    text: str
    through: frozenset[int]


@dataclass
class _Climb:
    """`pool`: the visited objects, samples first; `places`: their indexes by address. `chains`: such indexes, from a
    sample up to its latest referrer."""

    pool: list[Any]
    chains: list[list[int]]
    found: list[list[Holder]]
    places: dict[int, int]


def find(pool: list[Any], until_s: float) -> tuple[list[list[Holder]], bool]:
    """The holders of each object in `pool`, which is emptied, and whether the search ended in time."""
    places = {id(each): index for index, each in enumerate(pool)}
    climb = _Climb(pool, [[index] for index in range(len(pool))], [[] for _ in pool], places)
    in_time = True
    try:
        for _ in range(LEVELS_LIMIT):
            if climb.chains and in_time:
                in_time = _ascend(climb, until_s)
    finally:
        pool.clear()
        introspection.forget()
    return climb.found, in_time


def best(found: list[list[Holder]], grown: set[int], itself: str) -> tuple[str, set[int]]:
    """The name that holds most of the objects, preferably through a grown container; and the addresses between.

    A text that contains `itself` is the last choice.
    """
    counts: Counter[str] = Counter()
    growing: set[str] = set()
    through: dict[str, set[int]] = {}
    for holders in found:
        for holder in set(holders):
            counts[holder.text] += 1
            through.setdefault(holder.text, set()).update(holder.through)
            if holder.through & grown:
                growing.add(holder.text)
    if not counts:
        return "", set()
    own = {text for text in counts if itself and itself in text}
    first = min(counts, key=lambda text: (text not in growing, text in own, -counts[text], text))
    return first, through[first]


def _ascend(climb: _Climb, until_s: float) -> bool:
    """One level up: a chain ends with a name, continues with what refers to its head, or ends with nothing.

    False if time ran out.
    """
    if time.monotonic() > until_s:
        return False
    pool, heads = climb.pool, dict[int, list[list[int]]]()
    for chain in climb.chains:
        heads.setdefault(id(pool[chain[-1]]), []).append(chain)
    objects = [pool[chains[0][-1]] for chains in heads.values()]
    climb.chains = []
    referrers: list[Any] = gc.get_referrers(*objects)
    own = {id(pool), id(referrers), id(objects)}
    for referrer in referrers:
        if id(referrer) in own:
            continue
        if time.monotonic() > until_s:
            return False
        children = {id(child) for child in gc.get_referents(referrer)} & heads.keys()
        chains = [chain for child in children for chain in heads[child]]
        unnamed = [
            chain for chain in chains if not _is_named(climb, referrer, chain) or _is_link(pool[chain[0]], referrer)
        ]
        if unnamed and not any(type(referrer) is kind for kind in _DEAD_ENDS):
            place = climb.places.setdefault(id(referrer), len(pool))
            if place == len(pool):
                pool.append(referrer)
            climb.chains.extend([*chain, place] for chain in unnamed if place not in chain)
    del climb.chains[CHAINS_LIMIT:]
    return True


def _is_link(sample: Any, referrer: Any) -> bool:
    """Whether both belong to one linked chain of objects: the holder of its end is searched, too."""
    return type(sample) is type(referrer) and not any(type(sample) is plain for plain in _CONTAINERS)


def _is_named(climb: _Climb, referrer: Any, chain: list[int]) -> bool:
    links = [climb.pool[index] for index in chain]
    text = _name(referrer, links)
    if text:
        climb.found[chain[0]].append(Holder(text, frozenset(map(id, links))))
    return bool(text)


def _name(referrer: Any, links: list[Any]) -> str:
    """Which part of the referrer holds the last link; "" if it has no name."""
    kind = type(referrer)
    if kind is FunctionType:
        return _of_function(referrer, links)
    if kind is dict:
        return _of_globals(referrer, links)
    if kind is GeneratorType:
        return _of_call(f"generator {referrer.__qualname__}", referrer.gi_code, links)
    if kind is CoroutineType:
        return _of_call(f"coroutine {referrer.__qualname__}", referrer.cr_code, links)
    if kind is AsyncGeneratorType:
        return _of_call(f"generator {referrer.__qualname__}", referrer.ag_code, links)
    if kind is FrameType:
        return _of_call(f"a past call of {referrer.f_code.co_name}", referrer.f_code, links)
    if introspection.is_class(referrer):
        return _of_class(referrer, links)
    if kind is CellType or kind is ModuleType or any(kind is plain for plain in _CONTAINERS):
        return ""
    return _of_instance(referrer, links)


def _relation(links: list[Any], name: object, relation: str) -> str:
    """ "list in dict `cache`, closure variable of": the links from the sample up, and what holds the last."""
    between = [link for link in links[1:] if not _is_link(links[0], link)]
    kinds = [introspection.type_name(type(link)) for link in between[-CONTAINERS_LIMIT:]]
    before = " in ".join(kinds) + " " if kinds else ""
    return f"{before}`{name}`, {relation} of " if type(name) is str else f"{before}{relation} of "


def _of_function(function: Any, links: list[Any]) -> str:
    code, head, value = function.__code__, links[-1], links[-2] if len(links) > 1 else None
    place = f"function {function.__qualname__} ({introspection.place(code)})"
    if head is function.__closure__:
        for name, cell in zip(code.co_freevars, head, strict=False):
            if cell is value:
                return _relation(links[:-2], name, "closure variable") + place
    elif head is function.__defaults__:
        names = code.co_varnames[: code.co_argcount][-len(head) :]
        return _relation(links[:-1], _key(zip(names, head, strict=False), value), "default") + place
    elif head is function.__kwdefaults__:
        return _relation(links[:-1], _key(head.items(), value), "default") + place
    elif type(head) is dict and head is introspection.instance_dict(function):
        return _relation(links[:-1], _key(head.items(), value), "attribute") + place
    return ""


def _of_globals(names: dict[Any, Any], links: list[Any]) -> str:
    module = introspection.module_of_globals(names)
    if module is None:
        return ""
    name = _key(names.items(), links[-1])
    place = introspection.place_of_global(module, name) if name is not None else ""
    return _relation(links, name, "global") + f"module {module}" + (f" ({place})" if place else "")


def _of_call(what: str, code: Any, links: list[Any]) -> str:
    return _relation(links, None, "local variable") + f"{what} ({introspection.place(code)})"


def _of_class(kind: type, links: list[Any]) -> str:
    value = links[-2] if len(links) > 1 else None
    name = _key(introspection.class_dict(kind).items(), value)
    return "" if name is None else _relation(links[:-1], name, "attribute") + "class " + _class(kind)


def _of_instance(one: Any, links: list[Any]) -> str:
    kind, attributes = type(one), introspection.instance_dict(one)
    if kind is _LRU_CACHE:
        function = (attributes or {}).get("__wrapped__")
        place = f" ({introspection.place(function.__code__)})" if type(function) is FunctionType else ""
        return (
            _relation([], None, "cache") + f"function {getattr(function, '__qualname__', '') if place else '?'}{place}"
        )
    if attributes is not None and links[-1] is attributes:
        links, value = links[:-1], links[-2] if len(links) > 1 else None
    else:
        value = links[-1]
    name = _key((attributes or {}).items(), value) or _key(introspection.slots(one), value)
    if name is not None:
        return _relation(links, name, "attribute") + "object " + _class(kind)
    if any(ancestor is dict for ancestor in introspection.mro(kind)):
        return _relation(links, _key(dict.items(one), value), "entry") + "object " + _class(kind)
    if any(ancestor is base for ancestor in introspection.mro(kind) for base in (list, set, deque, tuple)):
        return _relation(links, None, "element") + "object " + _class(kind)
    return ""


def _class(kind: type) -> str:
    place = introspection.place_of_class(kind)
    return introspection.type_name(kind) + (f" ({place})" if place else "")


def _key(items: Any, value: Any) -> str | None:
    """The name of `value` among the items; None if it has none."""
    if value is None:
        return None
    for name, each in items:
        if each is value and type(name) is str:
            return name
    return None
