"""The rough size of an object, and a short description, without running its code."""

import sys
from collections import deque
from itertools import islice
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_worker.autopsy import introspection
from mlx_worker.autopsy.lazy_graphs import kind_of

DEPTH_LIMIT = 4
ITEMS_LIMIT = 16
_PLAIN = (str, bytes, bytearray, int, float, complex, bool, type(None))


def weigh(one: Any, depth: int = 0) -> int:
    """Bytes, estimated from the first few elements; 0 if unknown (a library's own memory)."""
    kind = type(one)
    if kind is mx.array:
        return kind_of(one).size_bytes
    if kind is np.ndarray:
        return int(one.nbytes)
    if any(kind is plain for plain in _PLAIN):
        return sys.getsizeof(one)
    if depth >= DEPTH_LIMIT:
        return 0
    if kind is dict:
        return _all(one.values(), len(one), depth)
    if any(kind is plain for plain in (list, tuple, set, frozenset, deque)):
        return _all(one, len(one), depth)
    if introspection.is_class(one):
        return 0
    attributes = list((introspection.instance_dict(one) or {}).values())
    attributes.extend(value for _, value in islice(introspection.slots(one), ITEMS_LIMIT))
    return object.__sizeof__(one) + _all(attributes, len(attributes), depth)


def _all(values: Any, count: int, depth: int) -> int:
    few = [weigh(value, depth + 1) for value in islice(values, ITEMS_LIMIT)]
    return 64 + (sum(few) + 8 * len(few)) * count // max(1, len(few))


def newest(container: Any) -> Any:
    """The last element of a list, deque or dictionary (its value); any of a set. None if it is empty."""
    ancestors = introspection.mro(type(container))
    if any(ancestor is dict for ancestor in ancestors):
        return next(iter(reversed(dict.values(container))), None)
    if any(ancestor is list for ancestor in ancestors):
        return next(list.__reversed__(container), None)
    if any(ancestor is deque for ancestor in ancestors):
        return next(deque.__reversed__(container), None)
    return next(set.__iter__(container), None)


def described(one: Any) -> str:
    """ "float32 [8, 512]", "numpy.ndarray float32 [8, 512]", or the name of the type."""
    kind = type(one)
    if kind is mx.array:
        return str(kind_of(one))
    if kind is np.ndarray:
        return f"numpy.ndarray {one.dtype} {list(one.shape)}"
    return introspection.type_name(kind)
