"""The folder of a run's results belongs to that run: no other run may overwrite finished results in silence."""

import contextlib
import fcntl
import itertools
import json
import os
import re
import shlex
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import msgspec

from mlx_supervisor import wire
from mlx_supervisor.wire.owner import LIMIT_BYTES, OWNER_FILE, Owner, decoded
from mlx_worker.checkpoint.manifest import has_checkpoint
from mlx_worker.errors import RefusedError

PREVIOUS = "previous"
"""In the folder: the results of the run before one that was started with --fresh."""
_ADAPTERS = re.compile(r"(\d{7}_)?adapters\.safetensors|adapter_config\.json")


def check_output(folder: Path, job: wire.Job) -> str:
    """Why the job's run may not write to the folder; empty if it may. Leaves no traces, and the run may be running."""
    descriptor = _open(folder / OWNER_FILE, 0)
    if descriptor is None:
        return ""
    with os.fdopen(descriptor):
        owner, recorded = _owner(job), _recorded(descriptor)
        if recorded is not None and recorded.is_run_of(owner):
            return ""
        return _conflict(descriptor, folder, owner, job)


@contextlib.contextmanager
def claimed(
    folder: Path | None, job: wire.Job, key: str, kept: Collection[Path] = ()
) -> Iterator[Callable[[], list[str]]]:
    """Hold the folder for the job's run, and record the run there. Raises RefusedError if it is another run's.

    `key`: what names the folder. One that cannot be written is not held: the check before the first update reports it.
    Yields what to call before the first update: with --fresh it moves the former run's adapters to PREVIOUS, and
    returns a sentence if there were any. `kept`: files that must also stay where they are.
    """
    descriptor = None if folder is None or not job.settings_file else _made(folder)
    if folder is None or descriptor is None:
        yield list
        return
    with os.fdopen(descriptor):  # the lock is held until it is closed
        owner, recorded = _owner(job), _recorded(descriptor)
        if conflict := _conflict(descriptor, folder, owner, job):
            raise RefusedError(f"{key}: {conflict}")
        if job.fresh and (recorded is None or recorded.fresh != job.fresh):
            yield lambda: _begin(descriptor, folder, owner, job, kept)
            return
        if recorded is None or not recorded.is_run_of(owner):
            _record(descriptor, owner, keep_time=recorded is not None and _moved(recorded, owner))
        yield list


def _begin(descriptor: int, folder: Path, owner: Owner, job: wire.Job, kept: Collection[Path]) -> list[str]:
    """Set the former run's adapters aside, then record this run."""
    moved = set_aside(folder, kept) if job.task.kind == "mlx_lm" else None
    _record(descriptor, owner)
    return [] if moved is None else [f"The former adapters in {folder} were moved to {moved}."]


def set_aside(folder: Path, kept: Collection[Path] = ()) -> Path | None:
    """Move adapters to a new sub-folder; returns it, None if there were none. Raises OSError. `kept`: see `claimed`."""
    found = [path for path in sorted(folder.iterdir()) if _ADAPTERS.fullmatch(path.name) and not path.is_dir()]
    if not found:
        return None
    target = _unused(folder / PREVIOUS)
    target.mkdir()
    stay = {each.resolve() for each in kept}
    for path in found:
        if path.resolve() in stay:
            with contextlib.suppress(OSError):  # a file system without links
                os.link(path, target / path.name)
        else:
            path.rename(target / path.name)
    return target


def advice(folder: Path | None, job: wire.Job) -> str:
    """What --fresh does to the results in the folder, and how to keep them; empty without a folder."""
    if folder is None or not folder.exists():
        return ""
    if job.task.kind != "mlx_lm":
        return f"--fresh overwrites the results in {folder}; to keep them, {_remedy(folder, job)}."
    moves = f"--fresh moves the adapters in {folder} to {_unused(folder / PREVIOUS)}"
    return f"{moves}; to keep them there, start another run: {_remedy(folder, job)}."


def _record(descriptor: int, owner: Owner, *, keep_time: bool = False) -> None:
    time_ns = os.fstat(descriptor).st_mtime_ns
    with contextlib.suppress(OSError):  # a full disk: reported with the results, which need more room
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, msgspec.json.encode(owner) + b"\n", 0)
        if keep_time:  # the results are newer than the record
            os.utime(descriptor, ns=(time_ns, time_ns))


def _made(folder: Path) -> int | None:
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    return _open(folder / OWNER_FILE, os.O_CREAT)


def _open(path: Path, flags: int) -> int | None:
    """The owner file; read-only if another user made it, who may share the folder."""
    for mode in (os.O_RDWR | flags, os.O_RDONLY):
        with contextlib.suppress(OSError):
            return os.open(path, mode | os.O_CLOEXEC, 0o644)
    return None


def _owner(job: wire.Job) -> Owner:
    return Owner(job.run, job.settings_file, job.results_of, job.fresh)


def _conflict(descriptor: int, folder: Path, owner: Owner, job: wire.Job) -> str:
    """Lock the owner file; why the folder is not for this owner, or nothing."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        recorded = _recorded(descriptor)
        by = "another process" if recorded is None else str(recorded)
        return f"{folder} is in use by {by}, which is running; {_remedy(folder, job)}"
    except OSError:
        pass  # a file system without locks: the record must suffice
    recorded = _recorded(descriptor)
    if job.fresh or recorded is None or recorded.is_run_of(owner) or _moved(recorded, owner):
        return ""
    if not _has_results(descriptor, folder):
        return ""
    moves = f"to move the adapters to {_unused(folder / PREVIOUS)}"
    does = moves if job.task.kind == "mlx_lm" else "to overwrite them"
    return f"{folder} holds the results of {recorded}; to keep them, {_remedy(folder, job)}; {does}, add --fresh"


def _remedy(folder: Path, job: wire.Job) -> str:
    """How to give this run another folder."""
    if job.task.kind != "mlx_lm":
        return "set Task.export_dir to another folder"
    base, path = Path(job.task.base_dir), _unused(folder)
    other = str(path.relative_to(base) if path.is_relative_to(base) else path)
    if not job.settings_file.endswith(".toml"):
        return f"add --adapter-path {shlex.quote(other)}"
    typed = f"--adapter-path {shlex.quote(str(path))}"
    table = f"[runs.{json.dumps(job.run) if '.' in job.run else job.run}.task]"
    pair = f"adapter_path = {json.dumps(other)}"
    if any(not origin.startswith("--") for origin in job.task.options_from.values()):
        return f"set {pair} in the options of {table} in {job.settings_file}, or add {typed}"
    return f"add options = {{ {pair} }} to {table} in {job.settings_file}, or {typed} to the command"


def _unused(path: Path) -> Path:
    """The path, or the first of `path-2`, `path-3`, … that does not exist."""
    names = itertools.chain([path.name], (f"{path.name}-{number}" for number in itertools.count(2)))
    return next(each for name in names if not (each := path.with_name(name)).exists())


def _recorded(descriptor: int) -> Owner | None:
    try:
        return decoded(os.pread(descriptor, LIMIT_BYTES, 0))
    except OSError:
        return None


def _moved(recorded: Owner, owner: Owner) -> bool:
    """Whether the recorded run is this one, from before its state folder was moved: it resumes from there."""
    same = (recorded.run, recorded.settings_file) == (owner.run, owner.settings_file)
    if not same or not recorded.folder.startswith("/") or Path(recorded.folder).exists():
        return False
    return has_checkpoint(Path(owner.folder))


def _has_results(descriptor: int, folder: Path) -> bool:
    """Whether something was written to the folder since its owner was recorded."""
    since_ns = os.fstat(descriptor).st_mtime_ns
    with contextlib.suppress(OSError):
        return any(entry.stat().st_mtime_ns > since_ns for entry in folder.iterdir() if entry.name != OWNER_FILE)
    return False
