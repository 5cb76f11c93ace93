"""Two processes that run in alternating time slices, and the rate of each.

Consecutive runs on a shared machine differ by 10 % and more, because of its other load. Alternating slices of one
second see the same load: one process is stopped (SIGSTOP) while the other runs.
"""

import contextlib
import mmap
import os
import signal
import struct
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import psutil

VARIABLE = "BENCH_COUNTER"
"""Environment variable with the path of an 8-byte file in which a process counts its batches."""


class Counter:
    """A counter in a file that two processes share."""

    def __init__(self, path: Path) -> None:
        if not path.exists():
            path.write_bytes(bytes(8))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 8)

    @property
    def value(self) -> int:
        """The current count."""
        (number,) = struct.unpack("q", self._map[:])
        return int(number)

    def increase(self) -> None:
        """Add one."""
        self._map[:] = struct.pack("q", self.value + 1)


def counter() -> Counter | None:
    """This process's counter; None if it is not timed."""
    path = os.environ.get(VARIABLE)
    return None if path is None else Counter(Path(path))


class Contestant:
    """A process that is stopped outside its slices."""

    def __init__(self, name: str, command: Sequence[str], folder: Path, environment: Mapping[str, str]) -> None:
        self.name = name
        self._counter = Counter(folder / f"{name}.count")
        self.output = folder / f"{name}.log"
        self.batches, self.cpu_s = 0, 0.0
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT,
                env={**os.environ, **environment, VARIABLE: str(folder / f"{name}.count")},
            )  # fmt: skip

    def run_to(self, count: int, timeout_s: float) -> None:
        """Run until `count` batches, then stop. Raises RuntimeError if the process ends or takes too long."""
        self._signal(signal.SIGCONT)
        end_s = time.monotonic() + timeout_s
        while self._counter.value < count:
            self._require_running()
            if time.monotonic() > end_s:
                raise RuntimeError(f"{self.name} took {self._counter.value} batches in {timeout_s} s, not {count}")
            time.sleep(0.01)
        self._signal(signal.SIGSTOP)

    def run_slice(self, seconds: float) -> float:
        """Run for one slice, to the end of its last batch; returns the batches per second.

        Adds to `batches` and to `cpu_s`, the CPU time of all threads.
        """
        first_count, first_cpu_s = self._counter.value, self._cpu_s()
        self._signal(signal.SIGCONT)
        first, first_s = self._next_batch(self._counter.value)
        last, last_s = first, first_s
        while last_s - first_s < seconds:
            last, last_s = self._next_batch(last)
        self._signal(signal.SIGSTOP)
        self.batches += self._counter.value - first_count
        self.cpu_s += self._cpu_s() - first_cpu_s
        return (last - first) / (last_s - first_s)

    def _cpu_s(self) -> float:
        times = psutil.Process(self.process.pid).cpu_times()
        return float(times.user + times.system)

    def _next_batch(self, before: int) -> tuple[int, float]:
        while (value := self._counter.value) == before:
            self._require_running()
            time.sleep(0.0005)
        return value, time.perf_counter()

    def end(self) -> None:
        """Send SIGKILL, which works on a stopped process, too."""
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        self.process.wait()

    def _require_running(self) -> None:
        if self.process.poll() is not None:
            text = self.output.read_text(errors="replace")[-3000:]
            raise RuntimeError(f"{self.name} ended with {self.process.returncode}: {text}")

    def _signal(self, number: signal.Signals) -> None:
        self._require_running()
        self.process.send_signal(number)


@contextlib.contextmanager
def taking_turns(*contestants: Contestant) -> Iterator[None]:
    """End all contestants on leaving."""
    try:
        yield
    finally:
        for contestant in contestants:
            contestant.end()
