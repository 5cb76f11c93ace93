"""Memory footprints: the parsers against bytes of the documented layouts, and real processes on Linux."""

import ctypes
import errno
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.process import harness

from mlx_supervisor.host import footprint, process_tree
from mlx_supervisor.host.footprint import Gauge, readers
from mlx_supervisor.host.process_tree import Processes, ProcFile
from mlx_supervisor.wire import TOKEN_VARIABLE

UUID = bytes(range(16))
MIB = 2**20
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def rusage(**at: int) -> bytes:
    """A `rusage_info_v4`: a uuid of 16 bytes, then 35 unsigned 64-bit numbers; all different, but for those named."""
    offsets = {"wired": 56, "resident": 64, "footprint": 72, "lifetime_max": 240, "interval_max": 280}
    buffer = bytearray(UUID + struct.pack("<35Q", *range(1000, 1035)))
    for name, value in at.items():
        struct.pack_into("<Q", buffer, offsets[name], value)
    return bytes(buffer)


def test_the_physical_footprint_is_read_and_not_the_resident_set() -> None:
    found = rusage(wired=1, resident=2**30, footprint=17 * 2**30, lifetime_max=20 * 2**30)
    assert len(found) == 296
    assert footprint.parse_rusage(found) == 17 * 2**30


@pytest.mark.parametrize("size", [0, 232, 295, 297])
def test_a_structure_of_another_version_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"found {size} bytes; expected 296"):
        footprint.parse_rusage(bytes(size))


class FakeProcPidRusage:
    """libproc's function: knows process 7 only, and is refused process 9."""

    argtypes: object = None

    def __call__(self, pid: int, flavor: int, buffer: ctypes.Array[ctypes.c_char]) -> int:
        assert flavor == 4
        if pid != 7:
            ctypes.set_errno(errno.EPERM if pid == 9 else errno.ESRCH)
            return -1
        buffer.raw = rusage(footprint=123_456)
        return 0


class FakeLibproc:
    def __init__(self, path: str, use_errno: bool) -> None:
        assert (path, use_errno) == ("/usr/lib/libproc.dylib", True)
        self.proc_pid_rusage = FakeProcPidRusage()


def test_libproc_is_called_with_version_4(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", FakeLibproc)
    read = footprint.darwin_footprint()
    assert read(7).charged_bytes == 123_456
    with pytest.raises(ProcessLookupError):
        read(8)
    with pytest.raises(PermissionError):
        read(9)


STATUS = (
    b"Name:\tpython\nUmask:\t0022\nState:\tS (sleeping)\nTgid:\t7\nVmPeak:\t  912344 kB\nVmSize:\t  900000 kB\n"
    b"VmLck:\t       0 kB\nVmPin:\t       0 kB\nVmHWM:\t  700000 kB\nVmRSS:\t  650300 kB\nRssAnon:\t  100000 kB\n"
    b"RssFile:\t  550000 kB\nRssShmem:\t     300 kB\nVmData:\t  200000 kB\nVmSwap:\t   20000 kB\nThreads:\t4\n"
)


def test_what_cannot_be_taken_back_is_charged_and_pages_of_files_are_not() -> None:
    """Anonymous and shared memory, and what was swapped out."""
    assert footprint.parse_status(STATUS) == footprint.Memory((100_000 + 300 + 20_000) * 1024, 550_000 * 1024)


def test_locked_pages_of_a_file_are_charged() -> None:
    status = STATUS.replace(b"VmLck:\t       0", b"VmLck:\t   50000")
    assert footprint.parse_status(status) == footprint.Memory((120_300 + 50_000) * 1024, 500_000 * 1024)


def test_a_resident_set_that_the_kernel_does_not_divide_is_charged_in_full() -> None:
    status = b"State:\tR (running)\nVmRSS:\t    4000 kB\nVmSwap:\t      96 kB\n"
    assert footprint.parse_status(status) == footprint.Memory(4096 * 1024)


@pytest.mark.parametrize(
    "status", [b"", b"\n", b"garbage\n", STATUS.replace(b"650300", b"x"), STATUS.replace(b"RssFile:", b"RssFiles:")]
)
def test_a_status_that_makes_no_sense_is_refused(status: bytes) -> None:
    with pytest.raises(ValueError, match="expected VmRSS"):
        footprint.parse_status(status)


def test_a_process_without_virtual_memory_has_ended() -> None:
    with pytest.raises(ProcessLookupError):
        footprint.parse_status(b"Name:\tpython\nState:\tZ (zombie)\nTgid:\t7\nThreads:\t1\n")


ROLLUP = (
    b"55d0a1c1f000-7ffd2b5e6000 ---p 00000000 00:00 0                          [rollup]\n"
    b"Rss:                9436 kB\nPss:                4637 kB\nPss_Dirty:          2580 kB\n"
    b"Pss_Anon:           2540 kB\nPss_File:           2000 kB\nPss_Shmem:            97 kB\n"
    b"Shared_Clean:       6856 kB\nSwapPss:             300 kB\nLocked:                0 kB\n"
)


def test_of_the_proportional_set_the_charged_parts_are_read() -> None:
    assert footprint.parse_rollup(ROLLUP) == (2540 + 97 + 300) * 1024
    assert (
        footprint.parse_rollup(ROLLUP.replace(b"Locked:                0", b"Locked:               50")) == 2987 * 1024
    )
    assert footprint.parse_rollup(ROLLUP.replace(b"Pss_", b"Xss_")) == (4637 + 300) * 1024, "an older kernel"
    with pytest.raises(ValueError, match="expected a Pss line"):
        footprint.parse_rollup(ROLLUP.replace(b"Pss:    ", b"Qss:    "))


# ---- the sum, of processes that are only numbers


class FakeProcesses(Processes):
    """Processes by name alone; the first is the leader. `born`: those between fork and exec, with their parents."""

    def __init__(self, *pids: int, born: tuple[tuple[int, int], ...] = ()) -> None:
        super().__init__(pids[0])
        self.others = list(pids[1:])
        self.born = born

    def refresh(self) -> None: ...

    def newborn(self) -> list[tuple[int, int]]:
        return list(self.born)


class SharedReader:
    """Returns sizes in MiB and counts its calls; an exception instead of a size is raised."""

    def __init__(self, **sizes: "int | Exception") -> None:
        self.sizes = {int(name[1:]): size for name, size in sizes.items()}
        self.calls = 0

    def __call__(self, pid: int) -> int:
        self.calls += 1
        size = self.sizes[pid]
        if isinstance(size, Exception):
            raise size
        return size * MIB


class CountingReader:
    """The same for a reader of what is charged. `files`: bytes of files in MiB."""

    def __init__(self, files: int = 0, **sizes: "int | Exception") -> None:
        self._reader = SharedReader(**sizes)
        self.sizes, self._file_bytes = self._reader.sizes, files * MIB

    def __call__(self, pid: int) -> footprint.Memory:
        return footprint.Memory(self._reader(pid), self._file_bytes)


class FrozenClock:
    """Moves only when a test sets it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 100.0
        monkeypatch.setattr("mlx_supervisor.host.footprint.time.monotonic", lambda: self.now_s)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FrozenClock:
    return FrozenClock(monkeypatch)


def total_mib(gauge: Gauge) -> float:
    found = gauge.measure()
    assert found is not None
    return found.total_bytes / MIB


def test_children_are_all_but_the_leader() -> None:
    found = Gauge(FakeProcesses(1, 2, 3), 10_000 * MIB, (CountingReader(p1=100, p2=30, p3=5), None)).measure()
    assert found == footprint.Footprint(135 * MIB, 35 * MIB, 3)


def test_far_from_the_limit_shared_pages_are_not_read() -> None:
    shared = SharedReader()
    assert total_mib(Gauge(FakeProcesses(1, 2), 1000 * MIB, (CountingReader(p1=400, p2=400), shared))) == 800
    assert (
        total_mib(Gauge(FakeProcesses(1), 100 * MIB, (CountingReader(p1=99), shared))) == 99
    )  # alone, nothing is shared
    assert shared.calls == 0


def test_shared_pages_count_once_near_the_limit() -> None:
    gauge = Gauge(
        FakeProcesses(1, 2, 3),
        1000 * MIB,
        (CountingReader(p1=600, p2=600, p3=10), SharedReader(p1=310, p2=300, p3=10)),
    )
    assert gauge.measure() == footprint.Footprint(620 * MIB, 310 * MIB, 3)


@pytest.mark.parametrize("error", [PermissionError(13, "no"), FileNotFoundError(2, "old kernel"), ValueError("no Pss")])
def test_unreadable_shared_pages_lose_no_sample(error: Exception) -> None:
    gauge = Gauge(FakeProcesses(1, 2), 1000 * MIB, (CountingReader(p1=600, p2=600), SharedReader(p1=300, p2=error)))
    assert total_mib(gauge) == 900


def test_below_the_limit_shared_pages_are_read_twice_a_second_at_most(clock: FrozenClock) -> None:
    sizes, shared = CountingReader(p1=500, p2=500), SharedReader(p1=250, p2=250)
    gauge = Gauge(FakeProcesses(1, 2), 1000 * MIB, (sizes, shared))
    for _ in range(100):
        clock.now_s += 0.0049
        assert total_mib(gauge) == 500
    assert shared.calls == 2  # one reading of two processes
    sizes.sizes[1] = 510  # growth since then is seen at once
    assert total_mib(gauge) == 510
    clock.now_s += 0.1
    total_mib(gauge)
    assert shared.calls == 4


def test_a_reading_that_takes_long_is_taken_less_often(clock: FrozenClock) -> None:
    class SlowReader(SharedReader):
        def __call__(self, pid: int) -> int:
            clock.now_s += 0.05
            return super().__call__(pid)

    shared = SlowReader(p1=250, p2=250)
    gauge = Gauge(FakeProcesses(1, 2), 1000 * MIB, (CountingReader(p1=500, p2=500), shared))
    for _ in range(98):
        total_mib(gauge)
        clock.now_s += 0.05
    assert shared.calls == 2  # 0.1 s in 5 s


def test_newly_shared_pages_never_cause_an_overrun(clock: FrozenClock) -> None:
    """Two processes read the same file: each grows by its whole size, but it is in memory once."""
    sizes, shared = CountingReader(p1=450, p2=450), SharedReader(p1=225, p2=225)
    gauge = Gauge(FakeProcesses(1, 2), 1000 * MIB, (sizes, shared))
    assert total_mib(gauge) == 450
    sizes.sizes |= {1: 900, 2: 900}
    shared.sizes |= {1: 450, 2: 450}
    clock.now_s += 0.002
    assert total_mib(gauge) == 900, "the reading of 2 ms ago would give 1350"


def test_an_overrun_is_found_by_a_fresh_reading_and_then_confirmed_without_delay(clock: FrozenClock) -> None:
    shared = SharedReader(p1=600, p2=600)
    gauge = Gauge(FakeProcesses(1, 2), 1000 * MIB, (CountingReader(p1=1100, p2=1100), shared))
    assert total_mib(gauge) == 1200
    clock.now_s += 0.002
    assert total_mib(gauge) == 1200
    assert shared.calls == 2
    clock.now_s += footprint.OVER_REREAD_S
    assert total_mib(gauge) == 1200
    assert shared.calls == 4


def test_a_process_that_joins_a_recent_overrun_is_counted_in_full(clock: FrozenClock) -> None:
    some = FakeProcesses(1, 2)
    gauge = Gauge(some, 1000 * MIB, (CountingReader(p1=1100, p2=1100, p3=50), SharedReader(p1=600, p2=600)))
    total_mib(gauge)
    some.others.append(3)
    assert total_mib(gauge) == 1250


def test_a_child_between_fork_and_exec_counts_only_beyond_its_parent() -> None:
    sizes = CountingReader(p1=700, p2=700, p3=40)
    gauge = Gauge(FakeProcesses(1, 2, 3, born=((2, 1),)), 1000 * MIB, (sizes, SharedReader(p1=700, p2=700, p3=40)))
    assert gauge.measure() == footprint.Footprint(740 * MIB, 40 * MIB, 3)
    sizes.sizes[2] = 750
    assert total_mib(gauge) == 790, "its own memory counts"


def test_a_child_that_ended_is_left_out_and_an_unreadable_one_raises() -> None:
    some = FakeProcesses(1, 2, 3)
    sizes = CountingReader(p1=100, p2=ProcessLookupError(3, "ended"), p3=7)
    assert Gauge(some, 1000 * MIB, (sizes, None)).measure() == footprint.Footprint(107 * MIB, 7 * MIB, 2)
    assert some.others == [3]
    sizes.sizes[3] = PermissionError(13, "hidden")
    with pytest.raises(PermissionError):
        Gauge(some, 1000 * MIB, (sizes, None)).measure()


def test_a_leader_that_ended_is_not_measured() -> None:
    assert (
        Gauge(
            FakeProcesses(1, 2), 1000 * MIB, (CountingReader(p1=ProcessLookupError(3, "ended"), p2=5), None)
        ).measure()
        is None
    )


# ---- for real


@contextmanager
def worker(code: str, token: str = "") -> Iterator[subprocess.Popen[bytes]]:
    """A process in a session of its own, once its first line of output has come. It ends with its standard input."""
    process = subprocess.Popen(
        [sys.executable, "-c", f"import os, sys, time\n{code}\nprint(flush=True)\nsys.stdin.read()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
        env=os.environ | {TOKEN_VARIABLE: token},
    )
    try:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
    finally:
        process.communicate()


def gauge_of(process: "subprocess.Popen[bytes]", token: str = "", limit_bytes: int = 2**40) -> Gauge:
    return Gauge(Processes(process.pid, token), limit_bytes, readers())


@on_linux
def test_a_real_session_and_its_memory_are_found() -> None:
    with worker("kept = b'x' * (64 << 20)\nif os.fork() == 0: sys.stdin.read(); os._exit(0)") as process:
        found = gauge_of(process).measure()
        assert found is not None
        assert found.processes == 2
        assert found.total_bytes > 64 * MIB
        read = footprint.StatusReader()
        assert read(process.pid).charged_bytes > 64 * MIB
    for each in (read, footprint.StatusReader()):  # also by the file that it keeps open
        with pytest.raises(ProcessLookupError):
            each(process.pid)


LEAVES = """
if os.fork() == 0:
    os.setsid()
    if os.fork(): os._exit(0)
    kept = b'x' * (64 << 20)
    print(flush=True)
    sys.stdin.read()
    os._exit(0)
os.wait()
sys.stdout = open(os.devnull, 'w')
"""


@on_linux
@pytest.mark.parametrize(("token", "counted"), [("4fa1", True), ("other", False), ("4fa", False), ("", False)])
def test_a_descendant_that_left_the_session_is_counted_by_its_token(token: str, counted: bool) -> None:
    with worker(LEAVES, "4fa1") as process:
        found = gauge_of(process, token).measure()
    assert found is not None
    assert (found.children_bytes > 64 * MIB) is counted
    assert found.processes == 1 + counted


FORKS = "kept = b'x' * (100 << 20)\nfor _ in range(3):\n    if os.fork() == 0: sys.stdin.read(); os._exit(0)"


@on_linux
def test_memory_shared_by_real_forked_children_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_tree, "NEWBORN_S", 0.0)
    with worker(FORKS) as process:
        roomy, short = gauge_of(process).measure(), gauge_of(process, limit_bytes=200 * MIB).measure()
    assert roomy is not None
    assert short is not None
    assert roomy.total_bytes > 400 * MIB
    assert 100 * MIB < short.total_bytes < 200 * MIB
    assert short.children_bytes > 50 * MIB  # three quarters of what is shared


STARTED = "if os.fork() == 0: os.execvp('sleep', ['sleep', '600'])"


@on_linux
@pytest.mark.parametrize(("code", "newborn_s", "found"), [(FORKS, 1e9, 3), (FORKS, 0.0, 0), (STARTED, 1e9, 0)])
def test_newborns_have_called_no_exec_recently(
    monkeypatch: pytest.MonkeyPatch, code: str, newborn_s: float, found: int
) -> None:
    monkeypatch.setattr(process_tree, "NEWBORN_S", newborn_s)
    with worker(code) as process:
        processes = Processes(process.pid)
        try:
            harness.eventually(lambda: refreshed(processes, lambda: len(processes.newborn()) == found))
            assert {parent for _, parent in processes.newborn()} <= {process.pid}
        finally:
            for pid in processes.others if code is STARTED else []:
                os.kill(pid, 9)


def refreshed(processes: Processes, condition: Callable[[], bool]) -> bool:
    processes.refresh()
    return len(processes.others) > 0 and condition()


@on_linux
def test_a_new_process_is_seen_as_soon_as_the_kernel_has_started_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_tree, "SCAN_INTERVAL_S", 1e9)
    monkeypatch.setattr(process_tree, "RESCAN_INTERVAL_S", 1e9)
    code = "sys.stdin.readline()\nif os.fork() == 0: sys.stdin.read(); os._exit(0)"
    process = subprocess.Popen(
        [sys.executable, "-c", f"import os, sys\n{code}\nsys.stdin.read()"],
        stdin=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        processes = Processes(process.pid)
        processes.refresh()
        assert processes.others == []
        assert process.stdin is not None
        process.stdin.write(b"\n")
        process.stdin.flush()
        harness.eventually(lambda: refreshed(processes, lambda: True))
    finally:
        process.communicate()


@on_linux
def test_a_process_that_exists_but_is_unreadable_has_not_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    def unmounted(path: str) -> ProcFile:
        raise FileNotFoundError(2, "no /proc here", path)

    monkeypatch.setattr(footprint, "ProcFile", unmounted)
    with pytest.raises(FileNotFoundError):
        footprint.StatusReader()(os.getpid())


MAPS = """
import mmap
room = mmap.mmap(os.open({path!r}, os.O_RDWR), 0, {flags})
for offset in range(0, len(room), mmap.PAGESIZE): {touch}
"""


@on_linux
@pytest.mark.parametrize(
    ("flags", "touch", "charged"),
    [
        ("mmap.MAP_SHARED", "room[offset]", False),
        ("mmap.MAP_PRIVATE", "room[offset]", False),
        ("mmap.MAP_PRIVATE", "room[offset] = 1", True),
    ],
)
def test_a_mapped_file_is_cache_until_it_is_written_privately(
    tmp_path: Path, flags: str, touch: str, charged: bool
) -> None:
    path = tmp_path / "data.bin"
    path.write_bytes(bytes(64 * MIB))
    with worker(MAPS.format(path=str(path), flags=flags, touch=touch)) as process:
        found = gauge_of(process).measure()
    assert found is not None
    assert (found.total_bytes > 64 * MIB) is charged
    assert (found.file_cache_bytes > 64 * MIB) is not charged


@on_linux
def test_shared_anonymous_memory_is_charged_once() -> None:
    code = (
        "import mmap\nroom = mmap.mmap(-1, 64 << 20)\n"
        "touch = lambda: [room.__setitem__(offset, 1) for offset in range(0, len(room), mmap.PAGESIZE)]\n"
        "ready = os.pipe()\n"
        "if os.fork() == 0: touch(); os.write(ready[1], b'1'); sys.stdin.read(); os._exit(0)\n"
        "os.read(ready[0], 1); touch()"
    )
    with worker(code) as process:
        found = gauge_of(process, limit_bytes=100 * MIB).measure()
    assert found is not None
    assert 64 * MIB < found.total_bytes < 100 * MIB
