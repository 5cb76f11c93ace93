"""Checkpoints that survive: written aside, flushed, sealed by a manifest, renamed; verified before they are loaded.

A folder `step-000000123` whose `MANIFEST.json` verifies is a checkpoint; anything else is not. A name that starts with
`.tmp-` is either being written or being deleted, and is swept away when nobody holds it.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

import mlx.core as mx
import numpy as np

from mlx_supervisor import wire
from mlx_worker.checkpoint import durable_files, exact_json
from mlx_worker.checkpoint.manifest import (
    MANIFEST,
    MODEL,
    OPTIMIZER,
    TRAINER,
    CheckpointError,
    FileEntry,
    Manifest,
    UnusableError,
    describe,
    examine,
    name_of,
    step_of,
    verify,
)

__all__ = ["CheckpointError", "CheckpointStore", "LoadedCheckpoint", "SavedCheckpoint", "weights_sha256"]

TRAINER_LIMIT_BYTES = 4 * 1024 * 1024
SPARE_BYTES = 64 * 1024 * 1024
"""Left free on the disk by every checkpoint, for logs and the journal."""
PASSED_OVER_LIMIT = 16
"""As many reasons as a `ready` message holds."""
_REASON_LIMIT_CHARACTERS = 512
_TEMPORARY = ".tmp-"


@dataclass(frozen=True)
class SavedCheckpoint:
    """A durable checkpoint. `notes`: what was in its way, and old ones that could not be deleted, one sentence each."""

    path: Path
    size_bytes: int
    seconds: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class LoadedCheckpoint:
    """What a verified checkpoint held; every array is evaluated."""

    step: int
    path: Path
    trained: dict[str, mx.array]
    optimizer: dict[str, mx.array]
    trainer: dict[str, Any]


@dataclass
class CheckpointStore:
    """The checkpoints of one run, in `folder`, of which the `keep` newest stay.

    One process at a time saves here. Raises CheckpointError when the folder cannot be made, flushed or read, ValueError
    when `keep` is less than 1.
    """

    folder: Path
    run: str
    keep: int
    files: durable_files.Files = field(default_factory=durable_files.Files)
    passed_over: list[str] = field(default_factory=list, init=False)
    """Filled by `load_newest`: what it did not use, and why, one sentence each; at most PASSED_OVER_LIMIT."""
    protected: frozenset[int] = field(default=frozenset(), init=False)
    """Steps whose checkpoints stay however many newer ones there are."""
    _damaged: set[Path] = field(default_factory=set, init=False)
    """Known to be damaged or, after a failed flush, not known to be durable: replaced when saved again."""

    def __post_init__(self) -> None:
        if self.keep < 1:
            raise ValueError(f"keep must be at least 1, found {self.keep}")
        with _telling(f"{self.folder}: the folder for checkpoints cannot be used"):
            durable_files.make_folders(self.files, self.folder.absolute())
            self._sweep()

    def save(
        self,
        step: int,
        trained: Mapping[str, mx.array],
        optimizer: Mapping[str, mx.array],
        trainer: Mapping[str, Any],
    ) -> SavedCheckpoint:
        """Write the checkpoint of `step`; it is durable when this returns. Older ones are deleted only after that.

        A valid checkpoint of the same step is left as it is, and nothing is written: the same step of the same run
        holds the same state. A damaged one is replaced; what may be somebody else's is given another name. Raises
        CheckpointError when the disk is too full, a write or a flush fails, or a weight is not finite; the checkpoints
        that were there stay as they were. MLX's errors pass.
        """
        started_s = time.perf_counter()
        path = self.folder / name_of(step)
        notes: list[str] = []
        size_bytes = self._standing(path, step)
        if size_bytes is None:
            payload = self._trainer_bytes(step, trainer)
            mx.eval(*trained.values(), *optimizer.values())
            _require_finite(step, trained)
            with _telling(f"step {step}: {self.folder} could not be swept"):  # what could not be deleted before
                self._sweep()
            self._require_space(step, trained, optimizer, payload)
            size_bytes, notes = self._write(path, step, trained, optimizer, payload)
            self._damaged.discard(path)
        notes += self._delete_old(path)
        return SavedCheckpoint(path, size_bytes, time.perf_counter() - started_s, tuple(notes))

    def load_newest(self) -> LoadedCheckpoint | None:
        """The newest checkpoint that verifies, or None; `passed_over` then says what was not used and why.

        Hashes are verified before anything is loaded. What fails after that is no damage of the checkpoint (the
        device's memory may be full), so it is raised, not passed over. Raises CheckpointError when the folder, or a
        file for lack of rights or descriptors, cannot be read: an older checkpoint would silently cost progress.
        """
        found, self.passed_over = self._list(tell_junk=True)
        for step, path in found:
            try:
                verify(path, self.run, step)
            except UnusableError as reason:
                if not reason.foreign:
                    self._damaged.add(path)
                self._pass_over(f"{path.name}: {reason}")
                continue
            return self._load(path, step)
        return None

    def _load(self, path: Path, step: int) -> LoadedCheckpoint:
        trained, optimizer = (_load_arrays(path / name) for name in (MODEL, OPTIMIZER))
        with _telling(f"{path / TRAINER}: cannot be read"):
            trainer = exact_json.loads((path / TRAINER).read_bytes())
        if not isinstance(trainer, dict):
            raise CheckpointError(f"{path / TRAINER}: expected an object, found {type(trainer).__name__}")
        return LoadedCheckpoint(step, path, trained, optimizer, trainer)

    # Writing

    def _standing(self, path: Path, step: int) -> int | None:
        """Size of the valid checkpoint that stands at `path`, None when there is none or it is damaged.

        It is durable: opening flushed what was there, and of what came since, only that which was flushed counts.
        """
        if path in self._damaged or not os.path.lexists(path):
            return None
        try:
            manifest = verify(path, self.run, step)
        except UnusableError:
            return None
        with _telling(f"step {step}: {path} could not be read"):
            return sum(entry.size_bytes for entry in manifest.files) + (path / MANIFEST).stat().st_size

    def _trainer_bytes(self, step: int, trainer: Mapping[str, Any]) -> bytes:
        try:
            payload = exact_json.dumps(dict(trainer))
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"step {step}: {TRAINER}: {error}") from None
        if len(payload) > TRAINER_LIMIT_BYTES:
            raise CheckpointError(
                f"step {step}: {TRAINER} has {len(payload)} bytes, the limit is {TRAINER_LIMIT_BYTES}"
            )
        return payload

    def _require_space(
        self, step: int, trained: Mapping[str, mx.array], optimizer: Mapping[str, mx.array], payload: bytes
    ) -> None:
        arrays = [*trained.values(), *optimizer.values()]
        header_bytes = 256 * (len(arrays) + 4)
        needed = sum(array.nbytes for array in arrays) + len(payload) + header_bytes + SPARE_BYTES
        with _telling(f"step {step}: free space of {self.folder} is unknown"):
            free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise CheckpointError(
                f"step {step}: the disk of {self.folder} is too full: {free / 2**20:.0f} MiB are free, a checkpoint "
                f"needs {needed / 2**20:.0f} MiB with {SPARE_BYTES / 2**20:.0f} MiB to spare; older checkpoints stay"
            )

    def _write(
        self,
        path: Path,
        step: int,
        trained: Mapping[str, mx.array],
        optimizer: Mapping[str, mx.array],
        payload: bytes,
    ) -> tuple[int, list[str]]:
        writers: dict[str, Callable[[durable_files.HashingFile], object]] = {
            MODEL: lambda file: mx.save_safetensors(_as_file(file), dict(trained), {"format": "mlx"}),
            OPTIMIZER: lambda file: mx.save_safetensors(_as_file(file), dict(optimizer), {"format": "mlx"}),
            TRAINER: lambda file: file.write(payload),
        }
        with self._temporary(step) as temporary:
            files = []
            for name, write in writers.items():
                with _telling(f"step {step}: {name} could not be written"):
                    files.append(FileEntry(name, *durable_files.write_file(temporary / name, write, self.files)))
            seal = wire.dump_json(Manifest(run=self.run, step=step, files=files))
            with _telling(f"step {step}: {MANIFEST} could not be written"):
                durable_files.write_file(temporary / MANIFEST, lambda file: file.write(seal), self.files)
                self.files.flush_folder(temporary)
            notes = self._publish(temporary, path, step)
        return sum(entry.size_bytes for entry in files) + len(seal), notes

    def _publish(self, temporary: Path, path: Path, step: int) -> list[str]:
        with _telling(f"step {step}: the checkpoint could not be given its name"):
            # what stands there cannot be used, and the new one is complete: this loses nothing
            notes = self._clear(path, step) if os.path.lexists(path) else []
            self.files.rename(temporary, path)
        try:
            self.files.flush_folder(self.folder)
        except OSError as error:
            self._damaged.add(path)  # a later save must not take its durability for granted, nor flush it once more
            with contextlib.suppress(OSError):
                self.files.rename(path, temporary)
            raise CheckpointError(f"step {step}: {self.folder} could not be flushed: {describe(error)}") from error
        return notes

    def _clear(self, path: Path, step: int) -> list[str]:
        """Free the name of a checkpoint. What may be somebody's is kept: one flipped bit can make it look so."""
        try:
            examine(path, self.run, step)
        except UnusableError as reason:
            if reason.foreign:
                aside = path.with_name(f"set-aside-{path.name}-{secrets.token_hex(4)}")
                self.files.rename(path, aside)
                return [f"{path.name} was in the way, and is now {aside.name}: {reason}"]
        self._retire(path)
        return []

    @contextlib.contextmanager
    def _temporary(self, step: int) -> Iterator[Path]:
        """A locked temporary folder, gone afterwards unless it was renamed."""
        with _telling(f"step {step}: no temporary folder in {self.folder}"):
            temporary = self.folder / f"{_TEMPORARY}{name_of(step)}-{secrets.token_hex(4)}"
            self.files.make_folder(temporary)
        with contextlib.ExitStack() as held:
            with contextlib.suppress(OSError):  # a file system without locks has no second worker either
                descriptor = os.open(temporary, os.O_RDONLY | os.O_DIRECTORY)
                held.callback(os.close, descriptor)
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held.callback(durable_files.delete_tree, self.files, temporary)
            yield temporary

    # Deleting

    def _sweep(self) -> None:
        """Delete temporary folders whose writer is gone."""
        for entry in self.folder.iterdir():
            if entry.name.startswith(_TEMPORARY) and not _is_locked(entry):
                durable_files.delete_tree(self.files, entry)

    def _delete_old(self, saved: Path) -> list[str]:
        """Delete what is older than the `keep` newest checkpoints, never `saved`; say what could not be deleted.

        Those of an earlier life are told valid by names and sizes: hashing them all after every save would cost a
        second per GB. One that `load_newest` found damaged does not count.
        """
        kept, notes = 0, []
        try:
            found, _ = self._list(tell_junk=False)
        except CheckpointError as error:
            return [str(error)]
        for step, path in found:
            try:
                examine(path, self.run, step)
                valid = path not in self._damaged
            except (UnusableError, CheckpointError) as reason:
                if isinstance(reason, CheckpointError) or reason.foreign:
                    continue
                valid = False
            if kept < self.keep or path == saved or step in self.protected:
                kept += valid
                continue
            try:
                self._retire(path)
            except OSError as error:
                notes.append(f"{path.name} could not be deleted: {describe(error)}")
        return notes

    def _retire(self, path: Path) -> None:
        """Rename first: a folder that is half deleted must not carry a checkpoint's name."""
        doomed = path.with_name(f"{_TEMPORARY}old-{path.name}-{secrets.token_hex(4)}")
        self.files.rename(path, doomed)
        durable_files.delete_tree(self.files, doomed)
        self._damaged.discard(path)

    # Reading

    def _list(self, *, tell_junk: bool) -> tuple[list[tuple[int, Path]], list[str]]:
        """Folders named like checkpoints, newest first, and sentences on what else lies there (dot files aside)."""
        found: list[tuple[int, Path]] = []
        junk: list[str] = []
        with _telling(f"{self.folder}: cannot be listed"):
            entries = sorted(self.folder.iterdir())
        for path in entries:
            step = step_of(path.name)
            if step is not None:
                found.append((step, path))
            elif tell_junk and not path.name.startswith(".") and len(junk) < PASSED_OVER_LIMIT // 2:
                junk.append(f"{path.name!r:.200}: not the name of a checkpoint.")
        return sorted(found, reverse=True), junk

    def _pass_over(self, sentence: str) -> None:
        if len(self.passed_over) < PASSED_OVER_LIMIT:
            self.passed_over.append(sentence[:_REASON_LIMIT_CHARACTERS])
        else:
            self.passed_over[-1] = "More were passed over; only the first reasons are told."


def weights_sha256(trained: Mapping[str, mx.array]) -> str:
    """SHA-256 over the trained tensors in name order: a line `name dtype shape` in JSON, then the bytes, row by row."""
    digest = hashlib.sha256()
    words = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}
    for name in sorted(trained):
        array = trained[name]
        dtype = str(array.dtype).rpartition(".")[2]
        digest.update(json.dumps([name, dtype, list(array.shape)]).encode() + b"\n")
        bits = np.array(array.view(words[array.dtype.size]), copy=False)  # numpy has no bfloat16
        digest.update(np.ascontiguousarray(bits).data)
    return digest.hexdigest()


def _as_file(file: durable_files.HashingFile) -> BinaryIO:
    return cast(BinaryIO, file)  # MLX asks for no more than write, seek and tell


def _load_arrays(path: Path) -> dict[str, mx.array]:
    arrays = mx.load(str(path))
    assert isinstance(arrays, dict)
    mx.eval(arrays)  # loading is lazy, and the file may be deleted by the next save
    return arrays


def _require_finite(step: int, trained: Mapping[str, mx.array]) -> None:
    """A device that failed, or a loss that diverged, must not replace the last good weights."""
    mx.synchronize()
    for name, array in trained.items():
        if mx.issubdtype(array.dtype, mx.floating) and not mx.all(mx.isfinite(array)).item():
            raise CheckpointError(f"step {step}: {name} holds values that are not finite; nothing was saved")


def _is_locked(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False


@contextlib.contextmanager
def _telling(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{what}: {describe(error)}") from error
