"""What makes a folder a checkpoint: its name, its manifest, and files that match the manifest."""

import contextlib
import errno
import io
import json
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from mlx_supervisor import wire
from mlx_supervisor.wire.fields import Count, Digest, RunName
from mlx_supervisor.wire.job import load_json
from mlx_worker.checkpoint import durable_files

MODEL, OPTIMIZER, TRAINER, MANIFEST = "model.safetensors", "optimizer.safetensors", "trainer.json", "MANIFEST.json"
AVERAGE, TASK_STATE, STREAM = "ema.safetensors", "task_state.safetensors", "stream.safetensors"
"""Only where a run has them: averaged weights, and the arrays in the task's own state and in its stream's position."""
CHECKPOINTS = "checkpoints"
"""In the run's folder: the folder of its checkpoints."""
MANIFEST_LIMIT_BYTES = 256 * 1024
_NAME = re.compile(r"step-([0-9]{9,18})")
_DAMAGE = {errno.ENOENT, errno.EIO, errno.ENOTDIR, errno.EISDIR, errno.ELOOP}


class CheckpointError(Exception):
    """A checkpoint could not be written, or the folder could not be read; the text says what failed and why."""


class DiskError(CheckpointError):
    """The disk or its folder refused: the same call may succeed later."""


class UnusableError(Exception):
    """Why a folder is not a checkpoint of this run. `foreign`: it may belong to another program; never delete it."""

    def __init__(self, reason: str, foreign: bool = False) -> None:
        super().__init__(reason)
        self.foreign = foreign


class FileEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One file of a checkpoint."""

    name: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*\Z", max_length=128)]
    size_bytes: Count
    sha256: Digest


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`MANIFEST.json`, written last: a folder is a checkpoint only if its manifest verifies."""

    v: Literal[1] = 1
    run: RunName
    step: Count
    files: Annotated[list[FileEntry], msgspec.Meta(min_length=1, max_length=64)]


def has_checkpoint(run_dir: Path) -> bool:
    """Whether the run's folder has something named like a checkpoint, damaged or not."""
    return any((run_dir / CHECKPOINTS).glob("step-*"))


def name_of(step: int) -> str:
    """The folder name of a step. Raises ValueError if the step is negative or has over 18 digits."""
    if not 0 <= step < 10**18:
        raise ValueError(f"a step must be from 0 to 10^18 - 1, found {step}")
    return f"step-{step:09d}"


def step_of(name: str) -> int | None:
    """The step of a folder with this name; None if it is not a checkpoint's name."""
    match = _NAME.fullmatch(name)
    if match is None or name_of(int(match[1])) != name:
        return None
    return int(match[1])


def verify(path: Path, run: str, step: int) -> Manifest:
    """The manifest, after checking every file's size and SHA-256. Raises UnusableError, CheckpointError."""
    manifest = examine(path, run, step)
    for entry in manifest.files:
        with _reading(path / entry.name):
            size_bytes, digest = durable_files.read_hash(path / entry.name)
        if size_bytes != entry.size_bytes or digest != entry.sha256:
            raise UnusableError(f"{entry.name} is damaged (its SHA-256 differs from the manifest).")
    return manifest


def examine(path: Path, run: str, step: int) -> Manifest:
    """The manifest, after checking names and sizes only. Raises UnusableError, CheckpointError."""
    with _reading(path):
        if not stat.S_ISDIR(path.lstat().st_mode):
            raise UnusableError("not a folder.", foreign=True)
    manifest = _read_manifest(path)
    if manifest.run != run:
        raise UnusableError(f"belongs to run {manifest.run!r}, not to {run!r}.", foreign=True)
    if manifest.step != step:
        raise UnusableError(f"{MANIFEST} is for step {manifest.step}.")
    names = [entry.name for entry in manifest.files]
    if len(set(names)) < len(names) or not {MODEL, OPTIMIZER, TRAINER} <= set(names):
        raise UnusableError(
            f"{MANIFEST} must list {MODEL}, {OPTIMIZER} and {TRAINER} once each, found {', '.join(names)!r:.200}."
        )
    for entry in manifest.files:
        with _reading(path / entry.name):
            status = (path / entry.name).lstat()
        if not stat.S_ISREG(status.st_mode):
            raise UnusableError(f"{entry.name} is not a regular file.")
        if status.st_size != entry.size_bytes:
            raise UnusableError(f"{entry.name} has {status.st_size:,} bytes, the manifest says {entry.size_bytes:,}.")
    return manifest


def _read_manifest(path: Path) -> Manifest:
    with _reading(path / MANIFEST), durable_files.open_to_read(path / MANIFEST) as file:
        data = io.BufferedReader(file).read(MANIFEST_LIMIT_BYTES + 1)
    try:
        return load_manifest(data)
    except wire.WireError as error:
        version = _version_of(data)
        if version != wire.VERSION:
            reason = f"{MANIFEST} has version {version!r:.20}, this program reads version {wire.VERSION}."
            raise UnusableError(reason, foreign=True) from None
        raise UnusableError(f"{MANIFEST} is invalid ({error}).") from None


def _version_of(data: bytes) -> object:
    """The version that a manifest claims; `wire.VERSION` if it claims none."""
    with contextlib.suppress(ValueError, RecursionError):
        content = json.loads(data)
        if isinstance(content, dict):
            return content.get("v", wire.VERSION)
    return wire.VERSION


def describe(error: OSError) -> str:
    """The error's message and symbolic name."""
    return f"{error.strerror or error} ({errno.errorcode.get(error.errno or 0, 'unknown error')})"


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """A missing or unreadable file is damage; missing rights or descriptors are not."""
    try:
        yield
    except OSError as error:
        if error.errno in _DAMAGE:
            raise UnusableError(f"cannot read {path.name}: {describe(error)}.") from None
        raise CheckpointError(f"cannot read {path}: {describe(error)}") from error


def load_manifest(data: bytes) -> Manifest:
    """The manifest in a `MANIFEST.json`. Raises WireError."""
    return load_json(data, Manifest, MANIFEST_LIMIT_BYTES)
