"""A simulated disk for the checkpoint store: fails at a chosen call, and loses unflushed data at a power loss.

Calls act on a real folder, which shows what a running system would read. Separately, the simulation tracks what the
device holds for certain: the content of each file as of its last flush, and the names in each folder as of its last
flush. At a power loss all later changes may be lost, kept, torn or zeroed, each file and each name independently and in
any order. A rename is kept or lost as a whole, as on every journaling file system.
"""

import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from errno import EIO, ENOSPC
from pathlib import Path
from typing import TypeVar

from mlx_worker.checkpoint import durable_files

T = TypeVar("T")
State = dict[str, "bytes | State"]
TAKES_SPACE = ("make_folder", "create", "write", "flush_file")
CALLS = (*TAKES_SPACE, "flush_folder", "close", "rename", "delete_file", "delete_folder")
SECTOR_BYTES = 64  # real ones are larger; so are real files


class Killed(BaseException):
    """The process was killed: none of its code runs, not even exception handlers."""


@dataclass
class File:
    flushed: bytes = b""
    data: bytearray = field(default_factory=bytearray)
    clean: bool = False
    """A flush failed: the system has marked the pages as clean and will never write them."""

    def after(self, survival: "Survival") -> bytes:
        """The state of an entry after a power loss."""
        return self.flushed if self.data == self.flushed else survival.content(self.flushed, bytes(self.data))


@dataclass
class Folder:
    flushed: "dict[str, Node]" = field(default_factory=dict)
    entries: "dict[str, Node]" = field(default_factory=dict)
    changes: "list[Change]" = field(default_factory=list)
    """A rename since the last flush: the old name or None, the new name or None, the entry."""

    def change(self, old: str | None, new: str | None, node: "Node") -> None:
        self._apply(self.entries, old, new, node)
        self.changes.append((old, new, node))

    @staticmethod
    def _apply(entries: "dict[str, Node]", old: str | None, new: str | None, node: "Node") -> None:
        if old is not None and entries.get(old) is node:
            del entries[old]
        if new is not None:
            entries[new] = node

    def flush(self) -> None:
        self.flushed, self.changes = dict(self.entries), []

    def after(self, survival: "Survival") -> State:
        """The state after a power loss, with everything below."""
        entries = dict(self.flushed)
        for change in survival.names(self.changes):
            self._apply(entries, *change)
        return {name: node.after(survival) for name, node in entries.items()}


Node = File | Folder
Change = tuple[str | None, str | None, Node]


@dataclass(frozen=True)
class Survival:
    """What survives of unflushed data in a power loss."""

    content: Callable[[bytes, bytes], bytes]
    names: "Callable[[list[Change]], list[Change]]"


def zeroed(flushed: bytes, data: bytes) -> bytes:
    """The length reached the device, the content did not."""
    return flushed + bytes(max(0, len(data) - len(flushed)))


FORGETS = Survival(lambda flushed, data: flushed, lambda changes: [])
KEEPS = Survival(lambda flushed, data: data, lambda changes: changes)
NAMES_ONLY = Survival(lambda flushed, data: flushed, lambda changes: changes)
ZEROS = Survival(zeroed, lambda changes: changes)


def anything(seed: int) -> Survival:
    """A random possible outcome for each file and each name."""
    rng = random.Random(seed)

    def torn(flushed: bytes, data: bytes) -> bytes:
        kept = bytearray(zeroed(flushed, data))
        for start in range(0, len(data), SECTOR_BYTES):
            if rng.random() < 0.5:
                kept[start : start + SECTOR_BYTES] = data[start : start + SECTOR_BYTES]
        return bytes(kept)

    def content(flushed: bytes, data: bytes) -> bytes:
        garbage = flushed + rng.randbytes(len(data) - len(flushed))
        prefix = data[: rng.randrange(len(data) + 1)]
        return rng.choice([flushed, data, prefix, zeroed(flushed, data), garbage, torn(flushed, data)])

    def names(changes: list[Change]) -> list[Change]:
        if rng.random() < 0.3:
            return changes[: rng.randrange(len(changes) + 1)]
        share = rng.choice([0.1, 0.5, 0.9, 1.0])
        return [change for change in changes if rng.random() < share]

    return Survival(content, names)


@dataclass(frozen=True)
class Fault:
    """A fault. `calls`: the calls where it can happen. `kills`: the process is killed there; `code`: the call's error.

    `halfway`: a write stores half of its bytes first; any other call completes first. `lasting`: from there on, every
    call of `calls` fails. `short`: a write stores this share of its bytes, which is no error.
    """

    calls: tuple[str, ...] = CALLS
    code: int = 0
    kills: bool = False
    halfway: bool = False
    lasting: bool = False
    short: float | None = None


FAULTS = {
    "kill before": Fault(kills=True),
    "kill amid or after": Fault(kills=True, halfway=True),
    "ENOSPC once": Fault(code=ENOSPC),
    "ENOSPC from there on": Fault(TAKES_SPACE, ENOSPC, lasting=True),
    "EIO once": Fault(code=EIO),
    "EIO after half of a write": Fault(("write",), EIO, halfway=True),
    "EIO from there on": Fault(code=EIO, lasting=True),
    "short write": Fault(("write",), short=0.5),
    "a write that stores no byte": Fault(("write",), short=0.0),
}


class CrashingDisk(durable_files.Files):
    """The simulated disk in `root`, which is made anew. `calls`: those since the last `install` or `arm`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.install({})

    def install(self, state: State) -> None:
        """Start from these contents, all flushed, without a fault."""
        shutil.rmtree(self.root, ignore_errors=True)
        self.tree = self._made(self.root, state)
        self.files: dict[int, File] = {}
        self.arm(None, -1)

    def _made(self, path: Path, state: State) -> Folder:
        path.mkdir()
        folder = Folder()
        for name, content in state.items():
            if isinstance(content, bytes):
                (path / name).write_bytes(content)
                folder.entries[name] = File(content, bytearray(content))
            else:
                folder.entries[name] = self._made(path / name, content)
        folder.flush()
        return folder

    def arm(self, fault: Fault | None, at: int) -> None:
        """A new process starts; the fault happens at the call of this number (from 0), or the next one where it can."""
        self.fault, self.at, self.calls, self.dead, self.struck = fault, at, list[str](), False, False

    def power_loss(self, survival: Survival) -> State:
        """The disk at the next start of the machine."""
        state = self.tree.after(survival)
        self.install(state)
        return state

    def flip(self, path: Path, offset: int, bit: int) -> None:
        """Flip one bit of the device's contents."""
        node = self._node(path)
        assert isinstance(node, File)
        node.data[offset] ^= 1 << bit
        node.flushed = bytes(node.data)
        path.write_bytes(node.data)

    def _node(self, path: Path) -> Node:
        node: Node = self.tree
        for name in path.relative_to(self.root).parts:
            assert isinstance(node, Folder)
            node = node.entries[name]
        return node

    def _folder(self, path: Path) -> Folder:
        node = self._node(path)
        assert isinstance(node, Folder)
        return node

    def _strikes(self, call: str) -> bool:
        """Whether the fault happens at this call: the first of its kind from `at` on."""
        fault, here = self.fault, len(self.calls)
        return fault is not None and call in fault.calls and here >= self.at and (fault.lasting or not self.struck)

    def _step(self, call: str, act: Callable[[], T]) -> T:
        """Perform the call, or the fault."""
        if self.dead:
            raise Killed
        fault, strikes = self.fault, self._strikes(call)
        self.calls.append(call)
        if fault is None or not strikes:
            return act()
        self.struck = True
        if fault.short is not None:
            return act()
        if fault.halfway:
            act()
        if fault.kills:
            self.dead = True
            raise Killed
        raise OSError(fault.code, os.strerror(fault.code))

    # The calls of the store

    def make_folder(self, path: Path) -> None:
        def act() -> None:
            super(CrashingDisk, self).make_folder(path)
            self._folder(path.parent).change(None, path.name, Folder())

        self._step("make_folder", act)

    def create(self, path: Path) -> int:
        def act() -> int:
            descriptor = super(CrashingDisk, self).create(path)
            self.files[descriptor] = File()
            self._folder(path.parent).change(None, path.name, self.files[descriptor])
            return descriptor

        return self._step("create", act)

    def write(self, descriptor: int, data: memoryview) -> int:
        part, fault = data, self.fault
        if fault is not None and self._strikes("write"):
            share = 0.5 if fault.halfway else fault.short
            part = data if share is None else data[: int(len(data) * share)]

        def act() -> int:
            self.files[descriptor].data += part
            return super(CrashingDisk, self).write(descriptor, part) if len(part) else 0

        return self._step("write", act)

    def flush_file(self, descriptor: int) -> None:
        file = self.files[descriptor]

        def act() -> None:
            if not file.clean:
                file.flushed = bytes(file.data)

        try:
            self._step("flush_file", act)
        except OSError:
            file.clean = True
            raise

    def close(self, descriptor: int) -> None:
        super().close(descriptor)  # always: a dead process holds no file open
        self.files.pop(descriptor)
        self._step("close", lambda: None)

    def flush_folder(self, folder: Path) -> None:
        if folder.is_relative_to(self.root):  # folders above belong to the test
            self._step("flush_folder", self._folder(folder).flush)

    def rename(self, source: Path, target: Path) -> None:
        assert source.parent == target.parent, "only a rename within a folder is one step"

        def act() -> None:
            super(CrashingDisk, self).rename(source, target)
            self._folder(source.parent).change(source.name, target.name, self._node(source))

        self._step("rename", act)

    def delete_file(self, path: Path) -> None:
        self._step("delete_file", lambda: self._deleted(path, super(CrashingDisk, self).delete_file))

    def delete_folder(self, path: Path) -> None:
        self._step("delete_folder", lambda: self._deleted(path, super(CrashingDisk, self).delete_folder))

    def _deleted(self, path: Path, delete: Callable[[Path], None]) -> None:
        delete(path)
        self._folder(path.parent).change(path.name, None, self._node(path))
