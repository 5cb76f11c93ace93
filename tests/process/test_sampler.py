"""The sampler's thread: samples of real processes; a failed reading is a missing sample and never a zero."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from tests.process import harness

from mlx_supervisor.core.events import MemoryPressure, Sample, SampleMissing
from mlx_supervisor.host import memory
from mlx_supervisor.host.footprint import Footprint, Gauge
from mlx_supervisor.host.memory import MachineMemory
from mlx_supervisor.host.process_tree import ProcFile
from mlx_supervisor.sampling import pace
from mlx_supervisor.sampling.pace import Pace
from mlx_supervisor.sampling.worker_sampler import WorkerSampler
from mlx_supervisor.wire import TOKEN_VARIABLE

MIB = 2**20


class SampleList:
    """Keeps the samples of one run."""

    def __init__(self) -> None:
        self.events: list[Sample | SampleMissing] = []
        self.sampler = WorkerSampler(self._keep)

    def _keep(self, run: str, event: Sample | SampleMissing) -> None:
        assert (run, event.generation) == ("run", 3)
        self.events.append(event)
        self.sampler.delivered()

    def watch(self, pid: int, limit_bytes: int = 2**40, token: str = "") -> None:
        self.sampler.watch("run", 3, pid, limit_bytes, 0.005, token=token)

    def until(self, condition: Callable[[], bool]) -> None:
        harness.eventually(condition, lambda: f"{self.events[-3:]}")

    def more(self, number: int) -> list[Sample | SampleMissing]:
        """The next so many events."""
        before = len(self.events)
        self.until(lambda: len(self.events) >= before + number)
        return self.events[before:]


@pytest.fixture
def samples() -> Iterator[SampleList]:
    result = SampleList()
    yield result
    result.sampler.close()


@contextmanager
def holding(code: str = "", **variables: str) -> Iterator["subprocess.Popen[bytes]"]:
    """A process in its own session, once it has printed a line; killed and reaped at the end."""
    process = subprocess.Popen(
        [sys.executable, "-c", f"import os, sys\n{code}\nprint(flush=True)\nsys.stdin.read()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
        env=os.environ | variables,
    )
    try:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_sample_has_the_memory_of_the_worker_and_the_machine(
    samples: SampleList, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = MachineMemory(5 * MIB, MemoryPressure.WARN)
    monkeypatch.setattr(memory, "read", lambda: machine)
    child = (
        "if os.fork() == 0:\n"
        "    os.setsid(); kept = b'x' * (64 << 20); print(flush=True); sys.stdin.read(); os._exit(0)"
    )
    with holding(child, **{TOKEN_VARIABLE: "4fa1"}) as process:
        assert process.stdout is not None
        process.stdout.readline()
        samples.watch(process.pid, token="4fa1")
        (sample,) = samples.more(1)[:1]
        assert isinstance(sample, Sample)
        assert sample.processes == 2
        assert 32 * MIB < sample.children_bytes < sample.footprint_bytes
        assert (sample.available_bytes, sample.pressure) == machine


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (PermissionError(13, "Permission denied"), "PermissionError"),
        (b"garbage\n", "ValueError: /proc/"),
        (b"", "expected VmRSS"),
        (OSError(24, "Too many open files"), "Too many open files"),
    ],
)
def test_a_failed_reading_is_a_missing_sample_with_its_reason(
    samples: SampleList, monkeypatch: pytest.MonkeyPatch, found: "bytes | Exception", reason: str
) -> None:
    real, spoiled = ProcFile.read, threading.Event()

    def spoil(file: ProcFile) -> bytes:
        if not spoiled.is_set() or not file.path.endswith("/status"):
            return real(file)
        if isinstance(found, bytes):
            return found
        raise found

    monkeypatch.setattr(ProcFile, "read", spoil)
    with holding() as process:
        samples.watch(process.pid)
        assert isinstance(samples.more(1)[0], Sample)
        spoiled.set()
        samples.until(lambda: isinstance(samples.events[-1], SampleMissing))
        missing = samples.more(5)
        assert all(isinstance(each, SampleMissing) and reason in each.reason for each in missing)
        spoiled.clear()
        samples.until(lambda: isinstance(samples.events[-1], Sample))
    assert all(each.footprint_bytes > 0 for each in samples.events if isinstance(each, Sample))


def test_an_unreadable_process_list_is_a_missing_sample(samples: SampleList, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused() -> list[int]:
        raise PermissionError(13, "no /proc for you")

    monkeypatch.setattr("psutil.pids", refused)
    with holding() as process:
        samples.watch(process.pid)
        first = samples.more(1)[0]
    assert isinstance(first, SampleMissing)
    assert "no /proc for you" in first.reason


def test_a_worker_that_has_ended_is_neither_a_missing_sample_nor_a_zero(
    samples: SampleList, monkeypatch: pytest.MonkeyPatch
) -> None:
    with holding() as process:
        samples.watch(process.pid)
        samples.more(2)
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, and not reaped
        took = threading.Event()
        measured: list[Footprint | None] = []
        real = Gauge.measure

        def measure(self: Gauge) -> Footprint | None:
            measured.append(real(self))
            if len(measured) >= 5:
                took.set()
            return measured[-1]

        monkeypatch.setattr(Gauge, "measure", measure)
        assert took.wait(harness.PATIENCE_S)
        assert measured == [None] * len(measured)
    assert all(isinstance(each, Sample) and each.footprint_bytes > 0 for each in samples.events)


def test_a_bug_in_measuring_one_run_does_not_affect_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    received: list[str] = []
    real = ProcFile.read

    def keep(run: str, event: Sample | SampleMissing) -> None:
        received.append(f"{run} {type(event).__name__}")
        both.delivered()

    def read(file: ProcFile) -> bytes:
        if file.path == f"/proc/{bad.pid}/status":
            raise TypeError("a bug")
        return real(file)

    monkeypatch.setattr(ProcFile, "read", read)
    both = WorkerSampler(keep)
    try:
        with holding() as bad, holding() as good:
            both.watch("bad", 1, bad.pid, 2**40, 0.005)
            both.watch("good", 1, good.pid, 2**40, 0.005)
            harness.eventually(lambda: received.count("good Sample") >= 3 and received.count("bad SampleMissing") >= 3)
    finally:
        both.close()


# ---- how often


def intervals(headrooms: list[int], limit: int, step_s: float = 0.05) -> list[float]:
    paced = Pace(limit, 0.05)
    return [paced.after(limit - left, 10.0 + step_s * index) for index, left in enumerate(headrooms)]


def test_the_interval_is_the_configured_one_far_from_the_limit_and_the_shortest_near_it() -> None:
    limit = 8192 * MIB
    assert intervals([8000 * MIB, 4000 * MIB], limit)[0] == 0.05
    assert intervals([1 * MIB], limit) == [pace.LEAST_INTERVAL_S]
    assert intervals([0, -100 * MIB], limit) == [pace.LEAST_INTERVAL_S] * 2


def test_fast_growth_once_seen_is_expected_from_then_on() -> None:
    limit, step = 8192 * MIB, 205 * MIB  # 4 GiB/s
    calm = intervals([400 * MIB, 400 * MIB], limit)[-1]
    grown = intervals([400 * MIB + step, 400 * MIB], limit)[-1]
    assert calm == 0.05
    assert grown == pytest.approx(400 * MIB / (step / 0.05) / pace.SAMPLES_BEFORE_LIMIT)
    after = intervals([400 * MIB + step, *[400 * MIB] * 4], limit)[-1]
    assert grown < after < calm
