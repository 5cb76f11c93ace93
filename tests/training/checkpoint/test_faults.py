"""Faults while saving: whatever fails, at whatever call, the newest acknowledged checkpoint loads."""

import errno
import fcntl
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest

from mlx_worker.checkpoint import durable_files
from mlx_worker.checkpoint.store import (
    LAST_RESERVE_BYTES,
    RESERVE_BYTES,
    CheckpointError,
    CheckpointStore,
    DiskError,
    weights_sha256,
)


def weights(step: int) -> dict[str, mx.array]:
    return {"w": mx.arange(1000, dtype=mx.float32) + step}


def save(store: CheckpointStore, step: int) -> None:
    store.save(step, weights(step), {"m": mx.ones((10,)) * step}, {"cursor": step})


def newest(folder: Path) -> int:
    """The step of the newest checkpoint, as a process started anew sees it; its content must be that step's."""
    loaded = CheckpointStore(folder, "run", 2).load_newest()
    assert loaded is not None
    assert weights_sha256(loaded.trained) == weights_sha256(weights(loaded.step))
    assert loaded.trainer == {"cursor": loaded.step}
    return loaded.step


class Failpoint:
    """Makes the nth call of a function of `os` fail, and counts the calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str, code: int, at: int) -> None:
        self.calls = 0
        real: Callable[..., Any] = getattr(os, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if self.calls == at:
                raise OSError(code, os.strerror(code))
            return real(*args, **kwargs)

        monkeypatch.setattr(os, name, call)


def save_or_error(store: CheckpointStore, step: int) -> str:
    try:
        save(store, step)
    except CheckpointError as error:
        return str(error)
    return ""


CALLS = ("write", "fsync", "replace", "open", "mkdir")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("name", CALLS)
def test_a_failed_call_costs_no_acknowledged_checkpoint(tmp_path: Path, name: str, code: int) -> None:
    failed = 0
    for at in range(1, 100):
        folder = tmp_path / f"{name}-{code}-{at}"
        store = CheckpointStore(folder, "run", 2)
        for step in (1, 2):
            save(store, step)
        with pytest.MonkeyPatch.context() as patch:
            point = Failpoint(patch, name, code, at)
            error = save_or_error(store, 3)
        if error:
            failed += 1
            assert os.strerror(code) in error
            assert not list(folder.glob(".tmp-*")), "a failed save must give its space back"
        acknowledged = 2 if error else 3
        assert newest(folder) == acknowledged
        save(store, 3)  # without the fault, the same step must become durable
        assert newest(folder) == 3
        if point.calls < at:
            break
    else:
        pytest.fail("the failpoint never ran out of calls")
    assert failed >= {"write": 5, "fsync": 6, "replace": 1, "open": 6, "mkdir": 1}[name]


def test_a_file_whose_flush_failed_is_never_flushed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system has dropped the unwritten pages: a second fsync would wrongly report success."""
    store = CheckpointStore(tmp_path, "run", 2)
    failed: set[int] = set()
    real = os.fsync

    def fail_once(descriptor: int) -> None:
        inode = os.fstat(descriptor).st_ino
        assert inode not in failed
        if not failed:
            failed.add(inode)
            raise OSError(errno.EIO, "Input/output error")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fail_once)
    with pytest.raises(CheckpointError, match=r"cannot write model\.safetensors: Input/output error \(EIO\)"):
        save(store, 1)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_reported_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(tmp_path, "run", 2)
    save(store, 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10 * 2**20))
    with pytest.raises(CheckpointError, match=r"\(needs 65 MiB including a reserve of 64 MiB; 10 MiB free\)"):
        save(store, 2)
    assert newest(tmp_path) == 1


class Disk:
    """A disk of `room_mib` MiB for checkpoints and the reserve: the free space follows the checkpoints in `folder`."""

    def __init__(self, folder: Path, room_mib: float, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.room_bytes = folder, int(room_mib * 2**20)
        monkeypatch.setattr(shutil, "disk_usage", self.usage)

    def usage(self, _path: Path) -> SimpleNamespace:
        used = sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())
        return SimpleNamespace(free=RESERVE_BYTES + self.room_bytes - used)


def heavy(step: int) -> dict[str, mx.array]:
    return {"weight": mx.full((2**18,), step, dtype=mx.float32)}  # 1 MiB


def test_on_a_full_disk_the_checkpoint_that_the_new_one_replaces_is_deleted_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Disk(tmp_path, 3.3, monkeypatch)
    store = CheckpointStore(tmp_path, "run", 3)
    for step in (1, 2, 3):
        assert store.save(step, heavy(step), {}, {}).notes == ()
    (note,) = store.save(4, heavy(4), {}, {}).notes
    assert note == "deleted step-000000001 before the new checkpoint was written: the disk is nearly full"
    assert sorted(path.name[-1] for path in tmp_path.iterdir()) == ["2", "3", "4"]


def test_what_would_not_make_enough_room_is_not_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(tmp_path, 3.3, monkeypatch)
    store = CheckpointStore(tmp_path, "run", 3)
    for step in (1, 2, 3):
        store.save(step, heavy(step), {}, {})
    disk.room_bytes -= 2**20
    with pytest.raises(DiskError, match=r"disk nearly full \(needs 66 MiB .*; 63 MiB free\)"):
        store.save(4, heavy(4), {}, {})
    single = CheckpointStore(tmp_path, "run", 1)
    with pytest.raises(DiskError):
        single.save(4, heavy(4), {}, {})
    assert sorted(path.name[-1] for path in tmp_path.iterdir()) == ["1", "2", "3"], "the only one is never deleted"


def test_a_checkpoint_that_updates_depend_on_may_use_the_reserve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Disk(tmp_path, 0.5, monkeypatch)
    store = CheckpointStore(tmp_path, "run", 3)
    with pytest.raises(DiskError):
        store.save(1, heavy(1), {}, {})
    store.save(1, heavy(1), {}, {}, LAST_RESERVE_BYTES)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000001"]


def test_a_result_that_cannot_be_replaced_stays_and_the_attempt_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "adapters.safetensors"
    durable_files.replace_file(path, lambda file: file.write(b"old"))
    for name in ("write", "fsync", "replace"):
        with monkeypatch.context() as patch:
            Failpoint(patch, name, errno.ENOSPC, at=1)
            with pytest.raises(OSError, match="No space"):
                durable_files.replace_file(path, lambda file: file.write(b"new"))
        assert [each.name for each in tmp_path.iterdir()] == [path.name]
        assert path.read_bytes() == b"old"
    durable_files.replace_file(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new"
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask, "others may read a result"


def test_mlx_errors_leave_no_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(tmp_path, "run", 2)

    def out_of_memory(*args: object) -> None:
        raise RuntimeError("cudaMallocAsync failed: out of memory")

    monkeypatch.setattr(mx, "save_safetensors", out_of_memory)
    with pytest.raises(RuntimeError, match="out of memory"):
        save(store, 1)
    assert list(tmp_path.iterdir()) == []


def test_failed_deletions_of_old_checkpoints_are_reported_and_cost_nothing(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, "run", 1)
    save(store, 1)
    with pytest.MonkeyPatch.context() as patch:
        Failpoint(patch, "replace", errno.EIO, at=2)
        saved = store.save(2, weights(2), {}, {"cursor": 2})
    assert saved.notes == ("cannot delete old checkpoint step-000000001: Input/output error (EIO)",)
    assert newest(tmp_path) == 2


def test_half_deleted_and_half_written_folders_are_swept(tmp_path: Path) -> None:
    save(CheckpointStore(tmp_path, "run", 2), 1)
    for name in (".tmp-step-000000002-abc", ".tmp-old-step-000000000-abc"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").touch()
    assert newest(tmp_path) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000001"]


def test_sweeping_does_not_follow_links(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    (outside / "more").mkdir(parents=True)
    (outside / "more" / "precious").touch()
    folder = tmp_path / "checkpoints"
    (folder / ".tmp-step-000000002-abc" / "deep").mkdir(parents=True)
    (folder / ".tmp-step-000000002-abc" / "deep" / "link").symlink_to(outside)
    (folder / ".tmp-step-000000002-abc" / "file").symlink_to(outside / "more" / "precious")
    CheckpointStore(folder, "run", 2)
    assert list(folder.iterdir()) == []
    assert (outside / "more" / "precious").exists()


def test_a_failed_deletion_is_repeated_by_the_next_save(tmp_path: Path) -> None:
    """Otherwise a full disk would stay full."""
    store = CheckpointStore(tmp_path, "run", 1)
    with pytest.MonkeyPatch.context() as patch:
        Failpoint(patch, "write", errno.ENOSPC, at=3)
        Failpoint(patch, "rmdir", errno.EIO, at=1)
        assert "ENOSPC" in save_or_error(store, 1)
    assert len(list(tmp_path.glob(".tmp-*"))) == 1
    save(store, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000001"]


@pytest.mark.parametrize(("code", "opens"), [(errno.EACCES, True), (errno.EIO, False), (errno.ENOSPC, False)])
def test_a_folder_above_that_cannot_be_flushed(tmp_path: Path, code: int, opens: bool) -> None:
    """A folder without access is older than the run. Any other must be flushed, or a power loss may delete the run."""

    class Files(durable_files.Files):
        def flush_folder(self, folder: Path) -> None:
            if folder == tmp_path:
                raise OSError(code, os.strerror(code))

    if opens:
        CheckpointStore(tmp_path / "a" / "b", "run", 1, Files())
    else:
        with pytest.raises(CheckpointError, match=r"cannot use the checkpoint folder .*\(E"):
            CheckpointStore(tmp_path / "a" / "b", "run", 1, Files())


def test_a_folder_that_is_being_written_is_not_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening the folder again (another process, or a new store) must not disturb a running save."""
    store = CheckpointStore(tmp_path, "run", 2)
    real = durable_files.write_file

    def open_meanwhile(*args: Any) -> tuple[int, str]:
        result = real(*args)
        CheckpointStore(tmp_path, "run", 2)
        return result

    monkeypatch.setattr(durable_files, "write_file", open_meanwhile)
    save(store, 1)
    assert newest(tmp_path) == 1


def test_order_of_the_durable_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files before the manifest, the manifest before the name, the name flushed before anything old is deleted."""
    store = CheckpointStore(tmp_path, "run", 1)
    save(store, 1)
    log: list[str] = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").resolve() if sys.platform == "linux" else Path("?")
        log.append(f"flush {'temporary' if path.name.startswith('.tmp-') else path.name}")
        real_fsync(descriptor)

    def replace(source: Path, target: Path) -> None:
        log.append(f"rename to {'temporary' if target.name.startswith('.tmp-') else target.name}")
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    save(store, 2)
    expected = ["flush model.safetensors", "flush optimizer.safetensors", "flush trainer.json", "flush MANIFEST.json"]
    expected += ["flush temporary", "rename to step-000000002", f"flush {tmp_path.name}", "rename to temporary"]
    assert log == expected if sys.platform == "linux" else len(log) == len(expected)


@pytest.fixture
def full_fsync(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """A stand-in for macOS's fcntl."""
    calls: list[tuple[int, int]] = []
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", lambda descriptor, command: calls.append((descriptor, command)))
    return calls


def test_macos_flushes_the_drive_too(
    full_fsync: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: pytest.fail("fsync leaves the data in the drive's cache"))
    durable_files.flush_to_device(9)
    assert full_fsync == [(9, 51)]


@pytest.mark.parametrize(("code", "falls_back"), [(errno.ENOTSUP, True), (errno.EINVAL, True), (errno.EIO, False)])
def test_macos_falls_back_only_where_the_file_system_lacks_it(
    full_fsync: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch, code: int, falls_back: bool
) -> None:
    def refuse(descriptor: int, command: int) -> None:
        raise OSError(code, os.strerror(code))

    flushed: list[int] = []
    monkeypatch.setattr(fcntl, "fcntl", refuse)
    monkeypatch.setattr(os, "fsync", flushed.append)
    if falls_back:
        durable_files.flush_to_device(9)
        assert flushed == [9]
    else:
        with pytest.raises(OSError, match="Input/output error"):
            durable_files.flush_to_device(9)
        assert flushed == []


SAVER = """
import os, sys
from pathlib import Path
import mlx.core as mx
from mlx_worker.checkpoint.store import CheckpointStore
store = CheckpointStore(Path(sys.argv[1]), "run", 2)
loaded = store.load_newest()
step = loaded.step if loaded else 0
os.write(1, b"open %d\\n" % step)
while True:
    step += 1
    store.save(step, {"w": mx.arange(1000, dtype=mx.float32) + step}, {"m": mx.ones((300_000,))}, {"cursor": step})
    os.write(1, b"saved %d\\n" % step)
"""


def test_a_saver_killed_at_any_moment_loses_nothing_acknowledged(tmp_path: Path) -> None:
    rng = random.Random(20)
    acknowledged = 0
    for generation in range(8):
        before = newest_or_zero(tmp_path)  # read before the child deletes old ones
        child = subprocess.Popen([sys.executable, "-c", SAVER, str(tmp_path)], stdout=subprocess.PIPE)
        assert child.stdout is not None
        try:
            assert child.stdout.readline() == b"open %d\n" % before
            for _ in range(rng.randrange(1, 6)):
                acknowledged = int(child.stdout.readline().split()[1])
            delay_s = rng.random() * 0.02
            with pytest.raises(subprocess.TimeoutExpired):
                child.wait(delay_s)  # a moment that is no boundary between two saves
        finally:
            child.send_signal(signal.SIGKILL)
            rest = child.stdout.read().split()
            child.wait()
        acknowledged = max([acknowledged, *(int(word) for word in rest if word.isdigit())])
        assert newest(tmp_path) in (acknowledged, acknowledged + 1), f"generation {generation}"
        assert len([path for path in tmp_path.iterdir() if path.name.startswith("step-")]) <= 3


def newest_or_zero(folder: Path) -> int:
    return newest(folder) if any(folder.glob("step-*")) else 0
