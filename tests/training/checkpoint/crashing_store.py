"""A checkpoint store on a crashing disk, with a record of the acknowledged steps."""

import contextlib
import os
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
from tests.training.checkpoint.crashing_disk import CrashingDisk, Fault, Killed, State

from mlx_worker.checkpoint.store import CheckpointError, CheckpointStore, LoadedCheckpoint


@contextlib.contextmanager
def fast_folder() -> Iterator[Path]:
    """A folder for thousands of small files, in memory where that is possible: nothing here needs a real disk."""
    memory = Path("/dev/shm")
    fits = memory.is_dir() and os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 256 * 2**20
    with tempfile.TemporaryDirectory(prefix="checkpoints-", dir=memory if fits else None) as folder:
        yield Path(folder)


class Trial:
    """The store's processes on one disk. Every save writes its own number into all files: a mixture is detected."""

    def __init__(self, root: Path, keep: int = 2) -> None:
        self.disk = CrashingDisk(root)
        self.folder = root / "runs" / "a" / "checkpoints"
        self.keep = keep
        self.acknowledged = 0
        self.saves = 0
        self.store: CheckpointStore | None = None
        """The store of the process that `strike` started, if it opened."""
        self.attempted: defaultdict[int, set[int]] = defaultdict(set)

    def open(self) -> CheckpointStore:
        return CheckpointStore(self.folder, "a", self.keep, self.disk)

    def process(self, step: int) -> None:
        """What a worker does: open, load, save."""
        self.store = None
        self.store = self.open()
        self.load(self.store)
        self.save(self.store, step)

    def save(self, store: CheckpointStore, step: int) -> None:
        self.saves += 1
        self.attempted[step].add(self.saves)
        tag = step * 1_000_000 + self.saves
        trained = {"w": mx.full((60,), tag, dtype=mx.int32), "b": mx.full((3,), tag, dtype=mx.int32)}
        store.save(step, trained, {"m": mx.full((40,), tag, dtype=mx.int32)}, {"tag": tag})
        self.acknowledged = max(self.acknowledged, step)

    def strike(self, step: int, fault: Fault | None, at: int) -> str:
        """A process with this fault: "killed", the error that the store raised, or "" when it acknowledged."""
        self.disk.arm(fault, at)
        try:
            self.process(step)
        except Killed:
            return "killed"
        except CheckpointError as error:
            return str(error)
        return ""

    def check(self) -> int:
        """A new process loads the newest acknowledged step or a newer one, intact, and names what it skipped."""
        self.disk.arm(None, -1)
        return self.load(self.open())

    def load(self, store: CheckpointStore) -> int:
        """The loaded step, after checking its content."""
        loaded = store.load_newest()
        step = 0 if loaded is None else self._checked(loaded)
        assert step >= self.acknowledged, f"step {step} came back, {self.acknowledged} was acknowledged"
        for path in self.folder.glob("step-*"):
            if int(path.name[5:]) > step:
                named = [sentence for sentence in store.skipped if sentence.startswith(f"{path.name}: ")]
                assert named, f"{path.name} was not named: {store.skipped}"
        self.acknowledged = step
        return step

    def check_on(self) -> None:
        """`check`, then continue: the next save is durable, even if the power fails right after it."""
        self.disk.arm(None, -1)
        store = self.open()
        self.save(store, self.load(store) + 1)
        assert not list(self.folder.glob(".tmp-*")), "temporary folders of crashed saves must not fill the disk"

    def _checked(self, loaded: LoadedCheckpoint) -> int:
        tag = loaded.trainer["tag"]
        step, save = divmod(int(tag), 1_000_000)
        assert loaded.step == step, "the content of another step"
        assert save in self.attempted[step], "the content of another save"
        arrays = {**loaded.trained, **loaded.optimizer}
        assert {name: array.size for name, array in arrays.items()} == {"w": 60, "b": 3, "m": 40}
        assert all(mx.all(array == tag).item() for array in arrays.values()), "a mixture of two saves"
        return step

    # The initial state of a trial

    def snapshot(self) -> tuple[State, int, dict[int, set[int]]]:
        """The disk as it is, for `restore`."""
        state = _content(self.disk.root)
        return state, self.acknowledged, {step: set(saves) for step, saves in self.attempted.items()}

    def restore(self, snapshot: tuple[State, int, dict[int, set[int]]]) -> None:
        state, self.acknowledged, attempted = snapshot
        self.attempted = defaultdict(set, {step: set(saves) for step, saves in attempted.items()})
        self.disk.install(state)


def _content(folder: Path) -> State:
    return {path.name: _content(path) if path.is_dir() else path.read_bytes() for path in folder.iterdir()}
