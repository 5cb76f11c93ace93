"""The sampler's thread: what it says of real processes, and that what can't be had is told and never a zero."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from tests.process import harness

from mlx_supervisor.core.events import MemoryPressure, Sample, SampleMissing
from mlx_supervisor.host import footprint, memory
from mlx_supervisor.host.footprint import Footprint
from mlx_supervisor.host.memory import MachineMemory
from mlx_supervisor.sampling import worker_sampler
from mlx_supervisor.sampling.worker_sampler import WorkerSampler
from mlx_supervisor.wire import TOKEN_VARIABLE

MIB = 2**20


class Heard:
    """Events as they come, taken at once."""

    def __init__(self) -> None:
        self.events: list[Sample | SampleMissing] = []
        self.sampler = WorkerSampler(self._hear)

    def _hear(self, run: str, event: Sample | SampleMissing) -> None:
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
def heard() -> Iterator[Heard]:
    result = Heard()
    yield result
    result.sampler.close()


@contextmanager
def holding(code: str = "", **variables: str) -> Iterator["subprocess.Popen[bytes]"]:
    """A process in a session of its own, ready when it says so; killed in the end, and reaped only then."""
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


def test_a_sample_tells_the_workers_memory_and_the_machines(heard: Heard, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = MachineMemory(5 * MIB, 6 * MIB, MemoryPressure.WARN)
    monkeypatch.setattr(memory, "read", lambda: machine)
    child = (
        "if os.fork() == 0:\n"
        "    os.setsid(); kept = b'x' * (64 << 20); print(flush=True); sys.stdin.read(); os._exit(0)"
    )
    with holding(child, **{TOKEN_VARIABLE: "4fa1"}) as process:
        assert process.stdout is not None
        process.stdout.readline()
        heard.watch(process.pid, token="4fa1")
        (sample,) = heard.more(1)[:1]
        assert isinstance(sample, Sample)
        assert sample.processes == 2
        assert 32 * MIB < sample.children_bytes < sample.footprint_bytes
        assert (sample.available_bytes, sample.swap_used_bytes, sample.pressure) == machine


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (PermissionError(13, "Permission denied"), "PermissionError"),
        (b"garbage\n", "ValueError: /proc/"),
        (b"", "seven numbers were expected"),
        (OSError(24, "Too many open files"), "Too many open files"),
    ],
)
def test_a_sample_that_can_not_be_had_is_told_with_its_reason(
    heard: Heard, monkeypatch: pytest.MonkeyPatch, found: "bytes | Exception", reason: str
) -> None:
    real, spoiled = footprint.read_file, threading.Event()

    def spoil(path: str) -> bytes:
        if not spoiled.is_set() or not path.endswith("/statm"):
            return real(path)
        if isinstance(found, bytes):
            return found
        raise found

    monkeypatch.setattr(footprint, "read_file", spoil)
    with holding() as process:
        heard.watch(process.pid)
        assert isinstance(heard.more(1)[0], Sample)
        spoiled.set()
        heard.until(lambda: isinstance(heard.events[-1], SampleMissing))
        missing = heard.more(5)
        assert all(isinstance(each, SampleMissing) and reason in each.reason for each in missing)
        spoiled.clear()
        heard.until(lambda: isinstance(heard.events[-1], Sample))
    assert all(each.footprint_bytes > 0 for each in heard.events if isinstance(each, Sample))


def test_the_processes_that_can_not_be_listed_are_a_missing_sample(
    heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused() -> list[int]:
        raise PermissionError(13, "no /proc for you")

    monkeypatch.setattr("psutil.pids", refused)
    with holding() as process:
        heard.watch(process.pid)
        first = heard.more(1)[0]
    assert isinstance(first, SampleMissing)
    assert "no /proc for you" in first.reason


def test_a_worker_that_has_ended_is_neither_missing_nor_nothing(heard: Heard) -> None:
    with holding() as process:
        heard.watch(process.pid)
        heard.more(2)
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, and not reaped
        took = threading.Event()
        measured: list[Footprint | None] = []
        gauge = heard.sampler._watches["run"].gauge
        real = gauge.measure

        def measure() -> Footprint | None:
            measured.append(real())
            if len(measured) >= 5:
                took.set()
            return measured[-1]

        gauge.measure = measure  # type: ignore[method-assign]
        assert took.wait(harness.PATIENCE_S)
        assert measured == [None] * len(measured)
    assert all(isinstance(each, Sample) and each.footprint_bytes > 0 for each in heard.events)


def test_one_run_that_can_not_be_measured_leaves_the_others_watched(heard: Heard) -> None:
    others: list[str] = []

    def hear(run: str, event: Sample | SampleMissing) -> None:
        others.append(f"{run} {type(event).__name__}")
        both.delivered()

    both = WorkerSampler(hear)
    try:
        with holding() as process:
            both.watch("bad", 1, process.pid, 2**40, 0.005)
            both._watches["bad"].gauge = None  # type: ignore[assignment]  # a bug of ours
            both.watch("good", 1, process.pid, 2**40, 0.005)
            harness.eventually(lambda: others.count("good Sample") >= 3 and others.count("bad SampleMissing") >= 3)
    finally:
        both.close()


# ---- how often


def intervals(headrooms: list[int], limit: int, step_s: float = 0.05) -> list[float]:
    watch = worker_sampler._Watch("run", 1, None, limit, 0.05, lambda: None)  # type: ignore[arg-type]
    return [
        WorkerSampler._interval_s(None, watch, limit - left, 10.0 + step_s * index)  # type: ignore[arg-type]
        for index, left in enumerate(headrooms)
    ]


def test_far_from_the_limit_the_configured_rate_holds_and_near_it_the_fastest() -> None:
    limit = 8192 * MIB
    assert intervals([8000 * MIB, 4000 * MIB], limit)[0] == 0.05
    assert intervals([1 * MIB], limit) == [worker_sampler.LEAST_INTERVAL_S]
    assert intervals([0, -100 * MIB], limit) == [worker_sampler.LEAST_INTERVAL_S] * 2


def test_growth_once_seen_is_feared_from_then_on() -> None:
    limit, step = 8192 * MIB, 205 * MIB  # 4 GiB/s
    calm = intervals([400 * MIB, 400 * MIB], limit)[-1]
    grown = intervals([400 * MIB + step, 400 * MIB], limit)[-1]
    assert calm == 0.05
    assert grown == pytest.approx(400 * MIB / (step / 0.05) / worker_sampler.LOOKS)
    after = intervals([400 * MIB + step, *[400 * MIB] * 4], limit)[-1]
    assert grown < after < calm
