"""Unevaluated arrays: the operations in their graphs, which keep their inputs alive.

MLX shows them in one way only: `mx.export_to_dot` writes them all as text. It recurses once per operation, so a long
chain would overflow the usual stack; it takes memory, and cannot be interrupted. Hence the precautions.
"""

import re
import sys
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import mlx.core as mx
import psutil

from mlx_worker.supervision.stop import leave_signals_to_the_main_thread

MIB = 1024 * 1024
NODE_BYTES = 400
"""Lower bound of the native memory per operation: 481 measured (Linux, MLX 0.32.4)."""
NODE_S = 4e-6
"""Time to write one operation: 1.1e-6 measured on an idle machine, 3e-6 on a busy one."""
STACK_SHARE = 0.5
"""Of the graph's own size: stack for the recursion; at most 170 bytes per operation measured."""
ROOM_SHARE = 1.5
"""Of the graph's own size: memory for the text; 640 bytes per operation measured."""
STACK_LIMIT_BYTES = 4096 * MIB
"""Address space, not memory: pages are taken only as deep as the recursion goes."""
ARRAYS_LIMIT = 100_000
NAMES_LIMIT = 1000
"""An MLX function takes at most 1024 named arguments."""
KINDS_LIMIT = 8
OWN_THREADS = ("MainThread", "signals", "lifeline", "hang-watchdog")
"""Threads that evaluate nothing. Any other may, and would change a graph during the walk."""
_WRITER = "checkpoints"
_OPERATION = "shape=rectangle"
_END = re.compile(r'-> "a(\d+)"$', re.MULTILINE)


class ArrayKind(NamedTuple):
    """Type and shape: arrays with the same are counted together."""

    dtype: mx.Dtype
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of one array."""
        size: int = self.dtype.size
        for length in self.shape:
            size *= length
        return size

    def __str__(self) -> str:
        return f"{str(self.dtype).rpartition('.')[2]} {list(self.shape)}"


def kind_of(one: Any) -> ArrayKind:
    """The kind of an array. Reading shape and type evaluates nothing."""
    return ArrayKind(one.dtype, one.shape)


@dataclass
class Graphs:
    """`operations`: of all graphs; None if not counted, with the `reason`.

    `by_kind`: operations of the graphs that end in arrays of a kind. `ends`: addresses of those arrays.
    `unevaluated_bytes`: their size once evaluated.
    """

    operations: int | None = None
    reason: str = ""
    by_kind: dict[ArrayKind, int] = field(default_factory=dict)
    ends: set[int] = field(default_factory=set)
    unevaluated_bytes: int = 0


@dataclass(frozen=True)
class Bounds:
    """`native_bytes`: this process's memory outside MLX's allocator, which holds the graphs; `grown_bytes`: its growth
    since training began; `room_bytes`: available for counting, and as much again for walking graphs."""

    native_bytes: int
    grown_bytes: int
    room_bytes: int


def count_operations(graphs: Graphs, arrays: list[Any], bounds: Bounds, until_s: float) -> None:
    """Count the unevaluated operations behind these arrays, if that is safe and fits in the time."""
    graphs.reason = _why_not(len(arrays), bounds, until_s)
    if graphs.reason:
        return
    try:
        _count(graphs, arrays, _stack_bytes(bounds), until_s)
    except Exception as error:  # no such thread, no memory for the text, another MLX
        graphs.operations, graphs.reason = None, f"{type(error).__name__}: {error}"


def _count(graphs: Graphs, arrays: list[Any], stack_bytes: int, until_s: float) -> None:
    ends, texts = list[Any](), list[_Text]()
    for start in range(0, len(arrays), NAMES_LIMIT):
        if time.monotonic() > until_s:
            graphs.reason = "not enough time"
            return
        some = arrays[start : start + NAMES_LIMIT]
        text = _walk(some, stack_bytes, named=True)
        ends.extend(some[end] for end in text.ends)
        texts.extend([text] if text.ends else [])
    if len(texts) > 1:  # graphs may have parts in common
        texts = [_walk(ends, stack_bytes)]
    graphs.operations = sum(text.operations for text in texts)
    kinds: defaultdict[ArrayKind, list[Any]] = defaultdict(list)
    for end in ends:
        graphs.ends.add(id(end))
        kinds[kind_of(end)].append(end)
    graphs.unevaluated_bytes = sum(kind.size_bytes * len(found) for kind, found in kinds.items())
    for kind, found in sorted(kinds.items(), key=lambda item: -len(item[1]))[:KINDS_LIMIT]:
        if time.monotonic() + NODE_S * graphs.operations > until_s:
            return
        graphs.by_kind[kind] = _walk(found, stack_bytes).operations


def _why_not(count: int, bounds: Bounds, until_s: float) -> str:
    """Why the graphs must not be walked; "" if they may."""
    others = [thread.name for thread in threading.enumerate() if not _is_harmless(thread)]
    if others:
        return f"thread {others[0]!r:.40} may be evaluating them"
    if count > ARRAYS_LIMIT:
        return f"more than {ARRAYS_LIMIT:,} arrays ({count:,})"
    if _stack_bytes(bounds) > STACK_LIMIT_BYTES:
        return f"{bounds.native_bytes // MIB:,} MiB of native memory may hold graphs too deep to walk"
    if bounds.grown_bytes * ROOM_SHARE > bounds.room_bytes:
        return "not enough memory below the limit to walk them"
    if bounds.grown_bytes / NODE_BYTES * NODE_S > until_s - time.monotonic():
        return "walking them may exceed the time limit"
    return ""


def _is_harmless(thread: threading.Thread) -> bool:
    if thread.name.startswith(_WRITER):  # not while it writes
        frame = sys._current_frames().get(thread.ident or 0)
        return frame is None or frame.f_code.co_name == "_worker"
    return thread.name in OWN_THREADS or type(thread).__module__.startswith("tqdm.")


def _stack_bytes(bounds: Bounds) -> int:
    """Stack for one chain of all operations that the process could hold."""
    if sys.platform == "darwin":  # compressed memory appears in no available counter
        return STACK_LIMIT_BYTES
    needed_bytes = (bounds.native_bytes + psutil.swap_memory().used) * STACK_SHARE
    return (int(needed_bytes) // MIB + 64) * MIB


class _Text:
    """The file-like object that `mx.export_to_dot` writes to."""

    def __init__(self) -> None:
        self.operations = 0
        self.ends: list[int] = []
        self.error: Exception | None = None

    def write(self, text: str) -> None:
        """Read the counts from the text, which comes in one call."""
        self.operations = text.count(_OPERATION)
        self.ends = [int(number) for number in _END.findall(text)]


def _walk(arrays: list[Any], stack_bytes: int, *, named: bool = False) -> _Text:
    """Count the distinct operations; `named`: also find which arrays end a graph. Raises MLX's errors."""
    text = _Text()

    def write() -> None:
        leave_signals_to_the_main_thread()
        try:
            if named:
                mx.export_to_dot(text, **{f"a{number}": one for number, one in enumerate(arrays)})
            else:
                mx.export_to_dot(text, arrays)
        except Exception as error:  # for the report; the worker's log is read for causes of its end
            text.error = error

    before_bytes = threading.stack_size()
    try:
        threading.stack_size(stack_bytes)
        thread = threading.Thread(target=write, name="autopsy", daemon=True)
        thread.start()
    finally:
        threading.stack_size(before_bytes)
    thread.join()
    if text.error is not None:
        raise text.error
    return text
