"""Counts of what this process holds: MLX arrays by shape and type, Python objects by type, containers by length.

No user code runs: only methods of built-in types read objects, and only numbers are hashed or compared. A census keeps
numbers and names, never an object.
"""

import gc
import sys
import time
from array import array
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import psutil

from mlx_worker.autopsy import introspection
from mlx_worker.autopsy.lazy_graphs import ArrayKind, Bounds, Graphs, count_operations, kind_of

CHUNK = 8192
"""Objects counted between two checks of the clock."""
OBJECT_BYTES = 120
"""Upper bound of the memory that counting takes per object: 90 measured for a million lists."""
ENTRY_BYTES = 8
"""Memory that listing takes per object."""
NO_ROOM = "not enough memory below the limit to count"
_LENGTHS: tuple[tuple[type, Any], ...] = (
    (list, list.__len__),
    (dict, dict.__len__),
    (set, set.__len__),
    (deque, deque.__len__),
)


@dataclass
class Census:
    """The counts at one moment. `parts`: which of "arrays" and "objects" were counted in time.

    `array_ids`, `container_ids`: addresses; `lengths`: of the containers, in the same order. An address may be reused
    by another object later. `unseen_bytes`: MLX's active memory that no evaluated array accounts for.
    `garbage_bytes`: MLX memory freed by a garbage collection just before. `reason`: why something was not counted, if
    not for lack of time.
    """

    step: int = 0
    parts: set[str] = field(default_factory=set)
    objects: int = 0
    arrays: "Counter[ArrayKind]" = field(default_factory=Counter)
    array_ids: "array[int]" = field(default_factory=lambda: array("Q"))
    container_ids: "array[int]" = field(default_factory=lambda: array("Q"))
    lengths: "array[int]" = field(default_factory=lambda: array("Q"))
    types: "Counter[str]" = field(default_factory=Counter)
    graphs: Graphs = field(default_factory=Graphs)
    shapes: int = 0
    active_bytes: int = 0
    unseen_bytes: int = 0
    native_bytes: int = 0
    garbage: int = 0
    garbage_bytes: int = 0
    reason: str = ""

    @property
    def complete(self) -> bool:
        """Whether everything was counted."""
        return self.parts == {"arrays", "objects"}

    def forget_addresses(self) -> None:
        """Drop them: later they may belong to other objects."""
        self.array_ids, self.container_ids, self.lengths = array("Q"), array("Q"), array("Q")
        self.graphs.ends.clear()


def take(census: Census, step: int, until_s: float, bounds: Bounds) -> list[Any]:
    """Count everything until `time.monotonic()` is `until_s`. Returns all objects, oldest first: drop them soon.

    `census` is filled rather than made, so that it exists at every census and none counts it as growth.
    """
    before_bytes = mx.get_active_memory()
    census.garbage = gc.collect()  # else garbage that waits for the collector counts as held
    census.step, census.active_bytes, census.native_bytes = step, mx.get_active_memory(), bounds.native_bytes
    census.garbage_bytes = max(0, before_bytes - census.active_bytes)
    if sys.getallocatedblocks() * ENTRY_BYTES > bounds.room_bytes:  # each object is one block at least
        census.reason = census.graphs.reason = NO_ROOM
        return []
    objects: list[Any] = gc.get_objects()
    arrays: list[Any] = [each for each in objects if type(each) is mx.array]
    census.objects = len(objects)
    _count_arrays(census, arrays, until_s)
    if len(objects) * OBJECT_BYTES > bounds.room_bytes:
        census.reason = f"{NO_ROOM} more than arrays ({len(objects):,} objects exist)"
    else:
        _count_objects(census, objects, until_s)
    count_operations(census.graphs, arrays, bounds, until_s)
    evaluated_bytes = sum(kind.size_bytes * count for kind, count in census.arrays.items())
    evaluated_bytes -= census.graphs.unevaluated_bytes
    census.unseen_bytes = max(0, census.active_bytes - evaluated_bytes)
    return objects


def native_bytes() -> int:
    """Resident memory of this process outside MLX's allocator."""
    try:
        resident_bytes = int(psutil.Process().memory_info().rss)
    except psutil.Error:
        return 0
    if mx.default_device() == mx.Device(mx.cpu):
        resident_bytes -= mx.get_active_memory() + mx.get_cache_memory()
    return max(0, resident_bytes)


def length_method(kind: type) -> Any:
    """The built-in `__len__` of a list, dictionary, set or deque, subclasses included; None for any other class."""
    for ancestor in introspection.mro(kind):
        for base, method in _LENGTHS:
            if ancestor is base:
                return method
    return None


def chunks(objects: list[Any]) -> Iterator[list[Any]]:
    """The objects in chunks, so that the clock can be checked between them."""
    for start in range(0, len(objects), CHUNK):
        yield objects[start : start + CHUNK]


def _count_arrays(census: Census, arrays: list[Any], until_s: float) -> None:
    for chunk in chunks(arrays):
        if time.monotonic() > until_s:
            census.arrays.clear()
            return
        census.arrays.update(map(kind_of, chunk))
        census.array_ids.extend(map(id, chunk))
    census.parts.add("arrays")


def _count_objects(census: Census, objects: list[Any], until_s: float) -> None:
    counts: Counter[int] = Counter()  # by address: hashing a class may run its metaclass's code
    classes: dict[int, type] = {}
    methods: dict[int, Any] = {}
    for chunk in chunks(objects):
        if time.monotonic() > until_s:
            return
        kinds = list(map(type, chunk))
        numbers = list(map(id, kinds))
        counts.update(numbers)
        for number, kind in dict(zip(numbers, kinds, strict=True)).items():
            if number not in classes:
                classes[number] = kind
                if (method := length_method(kind)) is not None:
                    methods[number] = method
        containers = [each for each in chunk if id(type(each)) in methods]
        census.container_ids.extend(map(id, containers))
        census.lengths.extend([methods[id(type(each))](each) for each in containers])
    for number, count in counts.items():
        if classes[number] is not mx.array:
            census.types[introspection.type_name(classes[number])] += count
    census.parts.add("objects")
