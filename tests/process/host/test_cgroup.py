"""Memory control groups: recorded layouts of both versions always, and a real group where one can be made."""

import asyncio
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
from tests.process import harness

from mlx_supervisor.host import cgroup as control_group
from mlx_supervisor.host import memory
from mlx_supervisor.host.cgroup import OomKills
from mlx_supervisor.process.child import Child

MIB = 2**20
V1_NO_LIMIT = "9223372036854771712\n"
HYBRID = (
    "31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755\n"
    "32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu\n"
    "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n"
    "41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n"
)
UNIFIED = "30 23 0:26 / /sys/fs/cgroup rw,nosuid,nodev,noexec,relatime shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
TOTAL_BYTES, AVAILABLE_BYTES = 25276064 * 1024, 24012000 * 1024


@pytest.fixture(autouse=True)
def fixed_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with `TOTAL_BYTES`."""
    found = SimpleNamespace(total=TOTAL_BYTES, available=AVAILABLE_BYTES)
    monkeypatch.setattr("psutil.virtual_memory", lambda: found)


def machine(root: Path, cgroup: str | None, mountinfo: str, files: dict[str, str]) -> Path:
    """A machine's files as they were recorded, under `root`. `files` are below /sys/fs/cgroup."""
    (root / "proc/self").mkdir(parents=True)
    if cgroup is not None:
        (root / "proc/self/cgroup").write_text(cgroup)
    (root / "proc/self/mountinfo").write_text(mountinfo)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def stat(inactive_file: int, version: int = 2) -> str:
    name = "inactive_file" if version == 2 else "total_inactive_file"
    return f"anon 77777\nfile 4096\n{name} {inactive_file}\nslab_reclaimable 5\n"


def test_the_lowest_limit_of_all_ancestors_applies(tmp_path: Path) -> None:
    files = {
        "memory.stat": stat(7),  # the root of version 2 has no limit of its own
        "train.slice/memory.max": f"{1000 * MIB}\n",
        "train.slice/memory.current": f"{900 * MIB}\n",
        "train.slice/memory.stat": stat(50 * MIB),
        "train.slice/mlx.service/memory.max": "max\n",
        "train.slice/mlx.service/memory.current": f"{10 * MIB}\n",
        "train.slice/mlx.service/memory.stat": stat(0),
        "train.slice/mlx.service/worker/memory.max": f"{2000 * MIB}\n",
        "train.slice/mlx.service/worker/memory.current": f"{10 * MIB}\n",
    }
    root = machine(tmp_path, "0::/train.slice/mlx.service/worker\n", UNIFIED, files)
    group = control_group.find(root=root)
    assert group is not None
    assert group.limit_bytes() == 1000 * MIB
    assert group.available_bytes() == 150 * MIB  # memory left, plus reclaimable file pages
    assert memory.machine_bytes(root) == 1000 * MIB
    assert memory.read(root).available_bytes == 150 * MIB


def test_without_a_limit_the_machines_memory_counts(tmp_path: Path) -> None:
    files = {"user.slice/memory.max": "max\n", "user.slice/memory.current": f"{9 * MIB}\n"}
    root = machine(tmp_path, "0::/user.slice\n", UNIFIED, files)
    assert memory.machine_bytes(root) == TOTAL_BYTES
    assert memory.read(root).available_bytes == AVAILABLE_BYTES


def test_a_limit_above_the_machines_memory_has_no_effect(tmp_path: Path) -> None:
    files = {"memory.max": f"{10**12}\n", "memory.current": "0\n"}
    root = machine(tmp_path, "0::/\n", UNIFIED, files)
    assert memory.machine_bytes(root) == TOTAL_BYTES
    assert memory.read(root).available_bytes == AVAILABLE_BYTES


def test_a_container_with_a_name_space_of_its_own_sees_its_limit_at_the_mount(tmp_path: Path) -> None:
    files = {"memory.max": f"{512 * MIB}\n", "memory.current": f"{600 * MIB}\n", "memory.stat": stat(0)}
    root = machine(tmp_path, "0::/\n", UNIFIED, files)
    assert memory.machine_bytes(root) == 512 * MIB
    assert memory.read(root).available_bytes == 0, "never negative"


def v1(usage: int, limit: str, **more: str) -> dict[str, str]:
    return {"memory.usage_in_bytes": f"{usage}\n", "memory.limit_in_bytes": limit, **more}


def test_version_1_in_a_hybrid_layout_with_the_limit_at_a_parent(tmp_path: Path) -> None:
    levels = {
        "memory/jobs/7": v1(100 * MIB, V1_NO_LIMIT),
        "memory/jobs": v1(300 * MIB, f"{400 * MIB}\n", **{"memory.stat": stat(40 * MIB, 1)}),
        "memory": v1(10_000 * MIB, V1_NO_LIMIT),
        "unified": {"memory.pressure": ""},
    }
    files = {f"{folder}/{name}": text for folder, each in levels.items() for name, text in each.items()}
    root = machine(tmp_path, "4:memory:/jobs/7\n3:cpuset:/\n1:cpu,cpuacct:/elsewhere\n0::/\n", HYBRID, files)
    group = control_group.find(root=root)
    assert group is not None
    assert (group.version, group.limit_bytes(), group.available_bytes()) == (1, 400 * MIB, 140 * MIB)


DOCKER_V1 = "40 31 0:32 /docker/4f2a /sys/fs/cgroup/memory ro,relatime master:17 - cgroup cgroup rw,memory\n"
DOCKER_JOINED = "40 31 0:32 /docker/4f2a /sys/fs/cgroup/memory,hugetlb ro - cgroup cgroup rw,memory,hugetlb\n"


@pytest.mark.parametrize(
    ("cgroup", "mountinfo", "folder"),
    [
        ("4:memory:/docker/4f2a\n", DOCKER_V1, "memory"),  # the host's path, of which the mount is the end
        ("4:hugetlb,memory:/docker/4f2a\n", DOCKER_JOINED, "memory,hugetlb"),
        ("4:memory:/docker/other\n", DOCKER_V1, "memory"),  # a path that is not under the mount at all
        ("4:memory:/../../outside\n", DOCKER_V1, "memory"),
    ],
)
def test_a_container_of_version_1_sees_the_hosts_path(tmp_path: Path, cgroup: str, mountinfo: str, folder: str) -> None:
    files = {f"{folder}/{name}": text for name, text in v1(64 * MIB, f"{256 * MIB}\n").items()}
    assert memory.machine_bytes(machine(tmp_path, cgroup, mountinfo, files)) == 256 * MIB


def test_version_1_writes_no_limit_as_a_number(tmp_path: Path) -> None:
    files = {f"memory/{name}": text for name, text in v1(5 * MIB, V1_NO_LIMIT).items()}
    group = control_group.find(root=machine(tmp_path, "4:memory:/\n", HYBRID, files))
    assert group is not None
    assert (group.limit_bytes(), group.available_bytes()) == (None, None)


def test_a_path_out_of_the_mount_is_not_followed(tmp_path: Path) -> None:
    files = {f"memory/{name}": text for name, text in v1(5 * MIB, f"{300 * MIB}\n").items()}
    root = machine(tmp_path, "4:memory:/../unified\n", HYBRID, {**files, "unified/cgroup.procs": ""})
    group = control_group.find(root=root)
    assert group is not None
    assert (group.folder, group.limit_bytes()) == (root / "sys/fs/cgroup/memory", 300 * MIB)


@pytest.mark.parametrize("path", ["/../../other", "/gone/by/now", "/gone (deleted)"])
def test_a_path_that_is_not_under_the_mount_leaves_the_mounts_limit(tmp_path: Path, path: str) -> None:
    root = machine(tmp_path, f"0::{path}\n", UNIFIED, {"memory.max": f"{300 * MIB}\n", "memory.current": "0\n"})
    assert memory.machine_bytes(root) == 300 * MIB
    group = control_group.find(root=root)
    assert group is not None
    assert group.folder == root / "sys/fs/cgroup"  # where kills are counted too


def test_a_mount_point_with_a_space_is_found(tmp_path: Path) -> None:
    mounts = "40 31 0:32 / /sys/fs/cgroup/my\\040groups rw - cgroup2 cgroup2 rw\n"
    files = {"my groups/a/memory.max": f"{300 * MIB}\n", "my groups/a/memory.current": "0\n"}
    assert memory.machine_bytes(machine(tmp_path, "0::/a\n", mounts, files)) == 300 * MIB


@pytest.mark.parametrize(
    ("cgroup", "mountinfo"),
    [(None, UNIFIED), ("", ""), ("0::/\n", ""), ("3:cpu:/a\n", HYBRID), ("garbage\n\n::\n", "garbage\n - \n")],
)
def test_without_a_memory_group_the_machine_counts(tmp_path: Path, cgroup: str | None, mountinfo: str) -> None:
    root = machine(tmp_path, cgroup, mountinfo, {"memory.max": "1\n"})
    assert control_group.find(root=root) is None
    assert memory.machine_bytes(root) == TOTAL_BYTES
    assert OomKills(1, root).happened() is None


def test_unreadable_or_malformed_files_are_no_limit(tmp_path: Path) -> None:
    files = {
        "a/memory.max": f"{300 * MIB}\n",
        "a/memory.current": "garbage\n",
        "a/b/memory.max": "-5\n",
        "a/b/c/memory.max/is-a-folder": "",
    }
    root = machine(tmp_path, "0::/a/b/c\n", UNIFIED, files)
    group = control_group.find(root=root)
    assert group is not None
    assert (group.limit_bytes(), group.available_bytes()) == (300 * MIB, 300 * MIB)


# ---- kills


def worker_in(root: Path, cgroup: str, pid: int = 7) -> None:
    (root / f"proc/{pid}").mkdir(exist_ok=True)
    (root / f"proc/{pid}/cgroup").write_text(cgroup)


def vmstat(root: Path, kills: int) -> None:
    (root / "proc/vmstat").write_text(f"nr_free_pages 5\noom_kill {kills}\nswap_ra 0\n")


def events(kills: int) -> str:
    return f"low 0\nhigh 9\nmax 33\noom 4\noom_kill {kills}\noom_group_kill 0\n"


def test_a_kill_in_another_group_is_not_counted(tmp_path: Path) -> None:
    root = machine(tmp_path, "0::/a\n", UNIFIED, {"a/memory.events": events(3)})
    worker_in(root, "0::/a\n")
    vmstat(root, 10)
    kills = OomKills(7, root)
    vmstat(root, 11)
    assert kills.happened() is False
    (root / "sys/fs/cgroup/a/memory.events").write_text(events(4))
    assert kills.happened() is True


def test_a_worker_that_moved_is_followed_and_earlier_kills_there_do_not_count(tmp_path: Path) -> None:
    control = "oom_kill_disable 0\nunder_oom 0\noom_kill {}\n"
    files = {"memory/a/memory.oom_control": control.format(0), "memory/b/memory.oom_control": control.format(5)}
    root = machine(tmp_path, "4:memory:/\n", HYBRID, files)
    worker_in(root, "4:memory:/a\n")
    vmstat(root, 10)
    kills = OomKills(7, root)
    worker_in(root, "4:memory:/b\n")
    kills.follow()
    (root / "proc/7/cgroup").unlink()  # reaped
    kills.follow()
    assert kills.happened() is False
    (root / "sys/fs/cgroup/memory/b/memory.oom_control").write_text(control.format(6))
    assert kills.happened() is True


def test_a_group_of_version_2_without_the_controller_is_counted_by_its_ancestor(tmp_path: Path) -> None:
    root = machine(tmp_path, "0::/a/b\n", UNIFIED, {"a/memory.events": events(0), "a/b/cgroup.procs": "7\n"})
    worker_in(root, "0::/a/b\n")
    kills = OomKills(7, root)
    (root / "sys/fs/cgroup/a/memory.events").write_text(events(1))
    assert kills.happened() is True


@pytest.mark.parametrize("removed", [True, False])
def test_without_the_groups_counter_the_machines_is_read(tmp_path: Path, removed: bool) -> None:
    text = events(0) if removed else "low 0\nhigh 0\n"  # an old kernel
    root = machine(tmp_path, "0::/a\n", UNIFIED, {"a/memory.events": text})
    worker_in(root, "0::/a\n")
    vmstat(root, 10)
    kills = OomKills(7, root)
    if removed:
        (root / "sys/fs/cgroup/a/memory.events").unlink()
    assert kills.happened() is False
    vmstat(root, 11)
    assert kills.happened() is True


# ---- for real


def make_group(name: str, limit_bytes: int) -> Path:
    """A new memory control group; skips the test with a reason where none can be made."""
    current = control_group.find()
    if current is None:
        pytest.skip("this machine has no memory control group")
    folder = current.mount / f"mlx-supervisor-test-{os.getpid()}-{name}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    limit, swap = (
        ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes") if current.version == 1 else ("memory.max", "")
    )
    try:
        (folder / limit).write_text(str(limit_bytes))
        with suppress(OSError):  # the kill comes with and without swap
            (folder / (swap or "memory.swap.max")).write_text(str(limit_bytes if swap else 0))
    except OSError as error:
        folder.rmdir()
        pytest.skip(f"no limit can be set here, as the memory controller is not delegated: {error}")
    return folder


def remove_group(folder: Path) -> None:
    def removed() -> bool:
        with suppress(OSError):
            folder.rmdir()
        return not folder.exists()

    harness.eventually(removed, lambda: f"{folder} can't be removed")


@pytest.fixture
def group() -> Iterator[Path]:
    folder = make_group("a", 64 * MIB)
    yield folder
    remove_group(folder)


@pytest.fixture
def another_group() -> Iterator[Path]:
    folder = make_group("b", 64 * MIB)
    yield folder
    remove_group(folder)


def within(folder: Path, code: str) -> list[str]:
    """A Python program that puts itself into the group first."""
    return ["/bin/sh", "-c", 'echo $$ > "$0/cgroup.procs" && exec "$1" -c "$2"', str(folder), sys.executable, code]


def test_the_limit_of_a_real_group_is_the_machines_memory(group: Path) -> None:
    code = "from mlx_supervisor.host import memory as m; print(m.machine_bytes(), m.read().available_bytes)"
    done = subprocess.run(within(group, code), capture_output=True, text=True, check=True)
    total, available = map(int, done.stdout.split())
    assert total == 64 * MIB
    assert 16 * MIB < available < 64 * MIB


EAT = "import os, sys, time\nwhile not os.path.exists({go!r}): time.sleep(0.01)\nx = b'x' * (200 << 20)"


def child_in(folder: Path, go: Path) -> Child:
    with Path(os.devnull).open("wb") as nowhere:
        return Child.spawn(
            within(folder, EAT.format(go=str(go))), Path("/"), "token", nowhere.fileno(), nowhere.fileno()
        )


def moved(child: Child, folder: Path) -> bool:
    found = control_group.find(child.pid)
    return found is not None and found.folder == folder


def test_the_kernels_kill_counts_only_for_the_worker_it_killed(
    group: Path, another_group: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    follows: Counter[OomKills] = Counter()
    real = OomKills.follow

    def follow(self: OomKills) -> None:
        real(self)
        follows[self] += 1

    monkeypatch.setattr(OomKills, "follow", follow)

    async def scenario() -> None:
        eater, bystander = child_in(group, tmp_path / "go"), child_in(another_group, tmp_path / "never")
        ends = [asyncio.ensure_future(each.wait()) for each in (eater, bystander)]
        try:
            async with asyncio.timeout(harness.PATIENCE_S):
                while not (moved(eater, group) and moved(bystander, another_group)):
                    await asyncio.sleep(0.01)
                follows.clear()
                while len(follows) < 2:
                    await asyncio.sleep(0.01)
                (tmp_path / "go").touch()
                eaten = await ends[0]
        finally:
            eater.brake()
            bystander.brake()
        killed = await ends[1]
        assert (eaten.signal, eaten.oom_killed) == (signal.SIGKILL, True)
        assert (killed.signal, killed.oom_killed) == (signal.SIGKILL, False)

    asyncio.run(scenario())
