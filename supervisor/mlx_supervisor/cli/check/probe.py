"""One worker that examines or measures a job, in a temporary folder, sampled like a run's worker.

The run's own folder, journal and lock are not touched: the run may be running.
"""

import asyncio
import secrets
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, TypeVar

import psutil

from mlx_supervisor import wire
from mlx_supervisor.core.actions import Spawn
from mlx_supervisor.host import memory
from mlx_supervisor.host.footprint import Gauge, readers
from mlx_supervisor.host.memory import machine_bytes
from mlx_supervisor.host.process_tree import Processes
from mlx_supervisor.process.child import Child, ExitStatus
from mlx_supervisor.process.launch import worker_command, write_job
from mlx_supervisor.settings.schema import Settings
from mlx_supervisor.settings.to_job import first_spawn
from mlx_supervisor.wire.check import CheckReport, MeasureReport
from mlx_supervisor.wire.job import load_json

SAMPLE_INTERVAL_S = 0.005
KEPT_INTERVAL_S = 0.05
AVAILABLE_SHARE = 0.9
"""Of the machine's available memory: a worker that uses more is killed before the machine runs out."""
REPORT_LIMIT_BYTES = 4 * 1024 * 1024
TAIL_LINES = 12

R = TypeVar("R", CheckReport, MeasureReport)


@dataclass(frozen=True)
class Probe(Generic[R]):
    """`report` None: the worker wrote none; `ended` says how it ended, `output` is the end of what it printed.

    `samples`: (time, footprint in bytes). `over_limit`: the worker was killed because it used more than the limit;
    `short_of_memory`: because it used almost all that was available.
    """

    report: R | None
    samples: list[tuple[float, int]]
    over_limit: bool
    short_of_memory: bool
    ended: str
    output: list[str]

    @property
    def peak_bytes(self) -> int:
        """The highest footprint."""
        return max((used_bytes for _, used_bytes in self.samples), default=0)

    def peak_after(self, time_s: float) -> int:
        """The highest footprint from a time on."""
        return max((used_bytes for at_s, used_bytes in self.samples if at_s >= time_s), default=self.peak_bytes)


class _Sampler:
    """Samples a worker until it ends, or kills it at the limit: two consecutive samples over it."""

    def __init__(self, child: Child, token: str, limit_bytes: int) -> None:
        self._child, self._limit_bytes = child, limit_bytes
        self._kill_bytes = min(limit_bytes, int(AVAILABLE_SHARE * memory.read().available_bytes))
        self._gauge = Gauge(Processes(child.pid, token), limit_bytes, readers())
        self.samples: list[tuple[float, int]] = []
        self.killed = False

    async def run(self, ended: Callable[[], bool]) -> None:
        over = 0
        while not ended():
            try:
                found = self._gauge.measure()
            except (OSError, ValueError, psutil.Error):
                found = None
            if found is not None:
                self._keep(time.monotonic(), found.total_bytes)
                over = over + 1 if found.total_bytes > self._kill_bytes else 0
            if over > 1:
                self.killed = True
                self._child.kill()
                return
            await asyncio.sleep(SAMPLE_INTERVAL_S)

    @property
    def over_limit(self) -> bool:
        """Whether it was killed at its own limit, rather than for lack of available memory."""
        return self.killed and self._kill_bytes == self._limit_bytes

    def _keep(self, now_s: float, used_bytes: int) -> None:
        """The highest sample of every `KEPT_INTERVAL_S`."""
        if self.samples and now_s - self.samples[-1][0] < KEPT_INTERVAL_S:
            self.samples[-1] = (self.samples[-1][0], max(self.samples[-1][1], used_bytes))
        else:
            self.samples.append((now_s, used_bytes))


async def examine(settings: Settings, name: str, limit_bytes: int) -> Probe[CheckReport]:
    """The job as a run would start it. The worker may hold more than the limit: it is not killed for that."""
    options = ["--checkpoints", str(settings.run_dir(name) / "checkpoints")]
    spawn = first_spawn(settings.runs[name])
    return await _run(settings, name, spawn, (limit_bytes, machine_bytes()), options, CheckReport)


async def measure(
    settings: Settings, name: str, limit_bytes: int, *, size: int, effective: int
) -> Probe[MeasureReport]:
    """A few updates at micro-batch `size`."""
    spawn = replace(first_spawn(settings.runs[name]), batch_size=size, effective_batch=effective)
    return await _run(settings, name, spawn, (limit_bytes, limit_bytes), ["--measure"], MeasureReport)


async def _run(
    settings: Settings, name: str, spawn: Spawn, limits_bytes: tuple[int, int], options: list[str], kind: type[R]
) -> Probe[R]:
    """`limits_bytes`: the job's limit, and the one at which the worker is killed."""
    with tempfile.TemporaryDirectory(prefix="mlx-check-", ignore_cleanup_errors=True) as text:
        folder = Path(text)
        job = write_job(settings, name, folder, None, spawn, limits_bytes[0])
        report, output = folder / "report.json", folder / "output.log"
        command = [*worker_command(), str(job), "--check", str(report), *options]
        token = secrets.token_hex(16)
        with output.open("wb") as file:
            child = Child.spawn(command, folder, token, file.fileno(), file.fileno())
        waiting = asyncio.ensure_future(child.wait())
        sampler = _Sampler(child, token, limits_bytes[1])
        try:
            await sampler.run(waiting.done)
            status = await waiting
        except BaseException:  # Ctrl-C: the worker must not outlive this command
            child.kill()
            await asyncio.wait({waiting})
            raise
        lines = output.read_text(errors="replace").splitlines()[-TAIL_LINES:]
        return Probe(
            _read(report, kind), sampler.samples, sampler.over_limit, sampler.killed and not sampler.over_limit,
            _ending(status), lines,
        )  # fmt: skip


def _read(path: Path, kind: type[R]) -> R | None:
    try:
        return load_json(path.read_bytes(), kind, REPORT_LIMIT_BYTES)
    except (OSError, wire.WireError):
        return None


def _ending(status: ExitStatus) -> str:
    if status.signal is not None:
        killer = "the kernel, for lack of memory" if status.oom_killed else f"signal {status.signal}"
        return f"killed by {killer}"
    return f"exit code {status.exit_code}"
