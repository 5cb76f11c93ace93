"""Durable checkpoints: written to a temporary folder, flushed, sealed by a manifest, renamed; verified before loading.

Only a folder `step-000000123` whose `MANIFEST.json` verifies is a checkpoint. A folder named `.tmp-…` is being written
or deleted; once its lock is free it is deleted.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
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
    DiskError,
    FileEntry,
    Manifest,
    UnusableError,
    describe,
    examine,
    name_of,
    step_of,
    verify,
)

__all__ = ["CheckpointError", "CheckpointStore", "DiskError", "LoadedCheckpoint", "SavedCheckpoint", "weights_sha256"]

TRAINER_LIMIT_BYTES = 4 * 1024 * 1024
RESERVE_BYTES = wire.RESERVE_BYTES
LAST_RESERVE_BYTES = 1024 * 1024
"""The same for a checkpoint without which updates would be lost: at a stop and at the end."""
SKIPPED_LIMIT = 16
"""Reasons that fit into a `ready` message."""
_REASON_LIMIT_CHARACTERS = 512
_TEMPORARY = ".tmp-"
_ARRAYS_SUFFIX = ".safetensors"


@dataclass(frozen=True)
class SavedCheckpoint:
    """A durable checkpoint. `notes`: renamed folders and failed deletions of old checkpoints, a sentence each."""

    path: Path
    size_bytes: int
    seconds: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class LoadedCheckpoint:
    """The content of a verified checkpoint; every array is evaluated. `more`: arrays of further files, by file."""

    step: int
    path: Path
    trained: dict[str, mx.array]
    optimizer: dict[str, mx.array]
    trainer: dict[str, Any]
    more: dict[str, dict[str, mx.array]] = field(default_factory=dict)


@dataclass
class CheckpointStore:
    """The checkpoints of one run, in `folder`; the `keep` newest are kept.

    Only one process at a time may save here. Raises CheckpointError if the folder cannot be made, flushed or read,
    ValueError if `keep` is less than 1.
    """

    folder: Path
    run: str
    keep: int
    files: durable_files.Files = field(default_factory=durable_files.Files)
    skipped: list[str] = field(default_factory=list, init=False)
    """Set by `load_newest`: each folder that it did not use, and why, a sentence each; at most SKIPPED_LIMIT."""
    protected: frozenset[int] = field(default=frozenset(), init=False)
    """Steps whose checkpoints are never deleted."""
    _damaged: set[Path] = field(default_factory=set, init=False)
    """Damaged, or not durable after a failed flush: replaced when saved again."""

    def __post_init__(self) -> None:
        if self.keep < 1:
            raise ValueError(f"checkpoint.keep must be at least 1, found {self.keep}")
        with _as_checkpoint_error(f"cannot use the checkpoint folder {self.folder}"):
            durable_files.make_folders(self.files, self.folder.absolute())
            self._sweep()

    def save(
        self,
        step: int,
        trained: Mapping[str, mx.array],
        optimizer: Mapping[str, mx.array],
        trainer: Mapping[str, Any],
        reserve_bytes: int = RESERVE_BYTES,
        more: Mapping[str, Mapping[str, mx.array]] | None = None,
    ) -> SavedCheckpoint:
        """Write the checkpoint of `step`; it is durable when this returns. Older ones are deleted only after that.

        `more`: the arrays of further safetensors files, by file name.

        A valid checkpoint of the same step is kept and nothing is written: the same step of the same run has the same
        state. A damaged one is replaced; a foreign folder of that name is renamed. A deleted checkpoint folder is made
        again. Leaves `reserve_bytes` of the disk free; where room is lacking, the checkpoints that this one replaces
        are deleted first, if another one stays and if that makes enough room. Raises DiskError if the disk is too full
        or a call fails, CheckpointError if a weight is not finite; existing checkpoints then stay as they are. MLX's
        errors pass through.
        """
        started_s = time.perf_counter()
        path = self.folder / name_of(step)
        notes: list[str] = []
        size_bytes = self._existing_size(path, step)
        if size_bytes is None:
            payload = _trainer_bytes(trainer)
            arrays = {MODEL: trained, OPTIMIZER: optimizer, **(more or {})}
            mx.eval(arrays)
            _require_finite(trained)
            notes += self._ensure_folder()
            with _as_checkpoint_error(f"cannot delete temporary folders in {self.folder}"):
                self._sweep()
            needed_bytes = needed_for(*arrays.values()) + len(payload) + reserve_bytes
            notes += self._make_room(path, needed_bytes, reserve_bytes)
            try:
                size_bytes, renamed = self._write(path, step, arrays, payload)
            except DiskError as error:
                if getattr(error.__cause__, "errno", None) not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                # the room was there before, or a quota is not in the free space
                raise DiskError(f"{error}; it {needs(needed_bytes, reserve_bytes)}") from error.__cause__
            notes += renamed
            self._damaged.discard(path)
        notes += self._delete_old(path)
        return SavedCheckpoint(path, size_bytes, time.perf_counter() - started_s, tuple(notes))

    def load_newest(self) -> LoadedCheckpoint | None:
        """The newest checkpoint that verifies, or None; `skipped` then lists the unused folders.

        Hashes are verified before anything is loaded. A later failure does not mean a damaged checkpoint (the device's
        memory may be full), so it is raised. Raises CheckpointError if the folder, or a file for lack of rights or
        descriptors, cannot be read: an older checkpoint would silently cost progress.
        """
        found, self.skipped = self._list(report_junk=True)
        for step, path in found:
            try:
                manifest = verify(path, self.run, step)
            except UnusableError as reason:
                if not reason.foreign:
                    self._damaged.add(path)
                self._skip(f"{path.name}: {reason}")
                continue
            return self._load(path, step, [entry.name for entry in manifest.files])
        return None

    def _load(self, path: Path, step: int, files: list[str]) -> LoadedCheckpoint:
        trained, optimizer = (_load_arrays(path / name) for name in (MODEL, OPTIMIZER))
        with _as_checkpoint_error(f"cannot read {path / TRAINER}"):
            trainer = exact_json.loads((path / TRAINER).read_bytes())
        if not isinstance(trainer, dict):
            raise CheckpointError(f"{path / TRAINER}: expected an object, found {type(trainer).__name__}")
        names = [name for name in files if name not in (MODEL, OPTIMIZER) and name.endswith(_ARRAYS_SUFFIX)]
        more = {name: _load_arrays(path / name) for name in names}
        return LoadedCheckpoint(step, path, trained, optimizer, trainer, more)

    # Writing

    def _existing_size(self, path: Path, step: int) -> int | None:
        """Size of the valid checkpoint at `path`; None if there is none or it is damaged.

        It is durable: opening the store flushed existing folders, and later ones count only once flushed.
        """
        if path in self._damaged or not os.path.lexists(path):
            return None
        try:
            manifest = verify(path, self.run, step)
        except UnusableError:
            return None
        with _as_checkpoint_error(f"cannot read {path}"):
            return sum(entry.size_bytes for entry in manifest.files) + (path / MANIFEST).stat().st_size

    def _ensure_folder(self) -> list[str]:
        """Make the checkpoint folder again if it was deleted during the run."""
        if self.folder.is_dir():
            return []
        with _as_checkpoint_error(f"cannot make {self.folder} again"):
            durable_files.make_folders(self.files, self.folder.absolute())
        self._damaged.clear()
        return [f"{self.folder} was deleted during the run, with its checkpoints; made it again"]

    def _make_room(self, path: Path, needed_bytes: int, reserve_bytes: int) -> list[str]:
        """Delete what the new checkpoint `path` replaces, if only that makes room. Raises DiskError.

        `needed_bytes`: with the reserve.
        """
        free_bytes = self.free_bytes()
        if free_bytes >= needed_bytes:
            return []
        replaced = self._replaced(path, self.keep - 1) if self.keep > 1 else []
        if free_bytes + sum(_size_of(each) for each in replaced) >= needed_bytes:
            notes = [
                f"deleted {each.name} before the new checkpoint was written: the disk is nearly full"
                for each in replaced
            ] + self._delete(replaced)
            free_bytes = self.free_bytes()
            if free_bytes >= needed_bytes:
                return notes
        raise DiskError(disk_nearly_full(free_bytes, needed_bytes, reserve_bytes=reserve_bytes))

    def free_bytes(self) -> int:
        """What this user may still write to the disk of the checkpoints. Raises DiskError."""
        with _as_checkpoint_error(f"cannot read the free space of {self.folder}"):
            return shutil.disk_usage(self.folder).free

    def _write(
        self,
        path: Path,
        step: int,
        arrays: Mapping[str, Mapping[str, mx.array]],
        payload: bytes,
    ) -> tuple[int, list[str]]:
        writers: dict[str, Callable[[durable_files.HashingFile], object]] = {
            name: partial(_write_arrays, dict(named)) for name, named in arrays.items()
        }
        writers[TRAINER] = lambda file: file.write(payload)
        with self._temporary(step) as temporary:
            files = []
            for name, write in writers.items():
                with _as_checkpoint_error(f"cannot write {name}"):
                    files.append(FileEntry(name, *durable_files.write_file(temporary / name, write, self.files)))
            seal = wire.dump_json(Manifest(run=self.run, step=step, files=files))
            with _as_checkpoint_error(f"cannot write {MANIFEST}"):
                durable_files.write_file(temporary / MANIFEST, lambda file: file.write(seal), self.files)
                self.files.flush_folder(temporary)
            notes = self._publish(temporary, path, step)
        return sum(entry.size_bytes for entry in files) + len(seal), notes

    def _publish(self, temporary: Path, path: Path, step: int) -> list[str]:
        with _as_checkpoint_error(f"cannot rename the temporary folder to {path.name}"):
            # an existing folder is unusable, and the new checkpoint is complete: this loses nothing
            notes = self._clear(path, step) if os.path.lexists(path) else []
            self.files.rename(temporary, path)
        try:
            self.files.flush_folder(self.folder)
        except OSError as error:
            self._damaged.add(path)  # a later save must neither trust it nor flush it again
            with contextlib.suppress(OSError):
                self.files.rename(path, temporary)
            raise DiskError(f"cannot flush {self.folder}: {describe(error)}") from error
        return notes

    def _clear(self, path: Path, step: int) -> list[str]:
        """Free a checkpoint's name. A foreign folder is only renamed: one flipped bit can make a checkpoint foreign."""
        try:
            examine(path, self.run, step)
        except UnusableError as reason:
            if reason.foreign:
                kept = path.with_name(f"set-aside-{path.name}-{secrets.token_hex(4)}")
                self.files.rename(path, kept)
                return [f"renamed foreign folder {path.name} to {kept.name}: {reason}"]
        self._retire(path)
        return []

    @contextlib.contextmanager
    def _temporary(self, step: int) -> Iterator[Path]:
        """A locked temporary folder, deleted afterwards unless it was renamed."""
        with _as_checkpoint_error(f"cannot make a temporary folder in {self.folder}"):
            temporary = self.folder / f"{_TEMPORARY}{name_of(step)}-{secrets.token_hex(4)}"
            self.files.make_folder(temporary)
        with contextlib.ExitStack() as held:
            with contextlib.suppress(OSError):  # without locks on this file system, continue: there is one worker
                descriptor = os.open(temporary, os.O_RDONLY | os.O_DIRECTORY)
                held.callback(os.close, descriptor)
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held.callback(durable_files.delete_tree, self.files, temporary)
            yield temporary

    # Deleting

    def _sweep(self) -> None:
        """Delete temporary folders that no process locks."""
        for entry in self.folder.iterdir():
            if entry.name.startswith(_TEMPORARY) and not _is_locked(entry):
                durable_files.delete_tree(self.files, entry)

    def _delete_old(self, saved: Path) -> list[str]:
        """Delete all but the `keep` newest checkpoints, never `saved`; returns notes on failed deletions."""
        try:
            return self._delete(self._replaced(saved, self.keep))
        except CheckpointError as error:
            return [str(error)]

    def _replaced(self, saved: Path, keep: int) -> list[Path]:
        """All but the `keep` newest checkpoints, and never `saved` or a protected one. Raises CheckpointError.

        Validity is checked by names and sizes only: hashing all after every save would cost a second per GiB. One that
        `load_newest` found damaged does not count.
        """
        kept, replaced = 0, []
        found, _ = self._list(report_junk=False)
        for step, path in found:
            try:
                examine(path, self.run, step)
                valid = path not in self._damaged
            except (UnusableError, CheckpointError) as reason:
                if isinstance(reason, CheckpointError) or reason.foreign:
                    continue
                valid = False
            if kept < keep or path == saved or step in self.protected:
                kept += valid
            else:
                replaced.append(path)
        return replaced

    def _delete(self, paths: list[Path]) -> list[str]:
        """Returns notes on failed deletions."""
        notes = []
        for path in paths:
            try:
                self._retire(path)
            except OSError as error:
                notes.append(f"cannot delete old checkpoint {path.name}: {describe(error)}")
        return notes

    def _retire(self, path: Path) -> None:
        """Rename, then delete: a half-deleted folder must not have a checkpoint's name."""
        doomed = path.with_name(f"{_TEMPORARY}old-{path.name}-{secrets.token_hex(4)}")
        self.files.rename(path, doomed)
        durable_files.delete_tree(self.files, doomed)
        self._damaged.discard(path)

    # Reading

    def _list(self, *, report_junk: bool) -> tuple[list[tuple[int, Path]], list[str]]:
        """Folders named like checkpoints, newest first, and a sentence on every other entry except dot files."""
        found: list[tuple[int, Path]] = []
        junk: list[str] = []
        with _as_checkpoint_error(f"cannot list {self.folder}"):
            entries = sorted(self.folder.iterdir())
        for path in entries:
            step = step_of(path.name)
            if step is not None:
                found.append((step, path))
            elif report_junk and not path.name.startswith(".") and len(junk) < SKIPPED_LIMIT // 2:
                junk.append(f"{path.name!r:.200}: not a checkpoint's name.")
        return sorted(found, reverse=True), junk

    def _skip(self, sentence: str) -> None:
        if len(self.skipped) < SKIPPED_LIMIT:
            self.skipped.append(sentence[:_REASON_LIMIT_CHARACTERS])
        else:
            self.skipped[-1] = "More were skipped; only the first reasons are listed."


def needed_for(*named: Mapping[str, mx.array]) -> int:
    """The size in bytes of a checkpoint's arrays on disk, with their headers."""
    arrays = [array for each in named for array in each.values()]
    return sum(array.nbytes for array in arrays) + 256 * (len(arrays) + 4)


def needs(needed_bytes: int, reserve_bytes: int, purpose: str = "") -> str:
    """In MiB, rounded up. `needed_bytes`: with the reserve. `purpose`: "for the export"."""
    reserve = f"including a reserve of {reserve_bytes // 2**20:,} MiB" if reserve_bytes else ""
    return " ".join(filter(None, (f"needs {-(-needed_bytes // 2**20):,} MiB", purpose, reserve)))


def disk_nearly_full(free_bytes: int, needed_bytes: int, purpose: str = "", *, reserve_bytes: int) -> str:
    """The free room is rounded down, so that it is less than the needed room. Parameters as of `needs`."""
    return f"disk nearly full ({needs(needed_bytes, reserve_bytes, purpose)}; {free_bytes // 2**20:,} MiB free)"


def weights_sha256(trained: Mapping[str, mx.array]) -> str:
    """SHA-256 over the trained tensors in name order: a line `name dtype shape` in JSON, then the bytes, row by row."""
    digest = hashlib.sha256()
    for name in sorted(trained):
        array = trained[name]
        dtype = str(array.dtype).rpartition(".")[2]
        digest.update(json.dumps([name, dtype, list(array.shape)]).encode() + b"\n")
        digest.update(np.ascontiguousarray(bits_of(array)).data)
    return digest.hexdigest()


def bits_of(array: mx.array) -> Any:
    """The array as unsigned integers of the same size, for numpy, which has no bfloat16. Nothing is copied."""
    words = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}
    return np.array(array.view(words[array.dtype.size]), copy=False)


def _trainer_bytes(trainer: Mapping[str, Any]) -> bytes:
    try:
        payload = exact_json.dumps(dict(trainer))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{TRAINER}: {error}") from None
    if len(payload) > TRAINER_LIMIT_BYTES:
        raise CheckpointError(f"{TRAINER} has {len(payload):,} bytes, the limit is {TRAINER_LIMIT_BYTES:,}")
    return payload


def _size_of(path: Path) -> int:
    """The sizes of a folder's files; 0 if it cannot be read."""
    try:
        return sum(entry.lstat().st_size for entry in path.iterdir())
    except OSError:
        return 0


def _write_arrays(arrays: dict[str, mx.array], file: durable_files.HashingFile) -> None:
    mx.save_safetensors(cast(BinaryIO, file), arrays, {"format": "mlx"})  # MLX uses only write, seek and tell


def _load_arrays(path: Path) -> dict[str, mx.array]:
    arrays = mx.load(str(path))
    assert isinstance(arrays, dict)
    mx.eval(arrays)  # loading is lazy, and the file may be deleted by the next save
    return arrays


def _require_finite(trained: Mapping[str, mx.array]) -> None:
    """A failed device or a diverged loss must not replace the last good weights."""
    mx.synchronize()
    for name, array in trained.items():
        if mx.issubdtype(array.dtype, mx.floating) and not mx.all(mx.isfinite(array)).item():
            raise CheckpointError(f"{name} contains NaN or infinity")


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
def _as_checkpoint_error(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DiskError(f"{what}: {describe(error)}") from error
